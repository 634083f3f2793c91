"""`python -m composer_kd FILE [key=value ...]`, and where the launcher hook leads: `python FILE [key=value ...]`.

With a command for FILE it is `composer-kd`; `composer -n 2 -m composer_kd record FILE` records on two ranks.
"""

import sys


def run_script() -> None:
    """Run the recipe that `sys.argv` names, and leave Python with its exit code."""
    from composer_kd.cli import run_recipe

    sys.exit(run_recipe(sys.argv[0], sys.argv[1:]))


if __name__ == '__main__':
    from composer_kd.cli import COMMANDS, main

    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        sys.exit(main())
    if len(sys.argv) < 2 or sys.argv[1].startswith('-'):
        sys.exit('usage: python -m composer_kd FILE [key=value ...]')
    del sys.argv[0]
    run_script()

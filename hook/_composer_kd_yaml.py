"""Let Python run a recipe: `python x.yaml`, and with it `composer -n 2 x.yaml a.b=3`.

A `.pth` file imports this module whenever Python starts, so it imports nothing but `sys`, and nothing else happens
until Python is asked to run a path that ends in .yaml or .yml. For such a path Python looks for an importer in
`sys.path_hooks` first: it is the mechanism by which a zip file or a folder is run.
"""

import sys


class _RecipeImporter:
    """Importer of one file that ends in .yaml or .yml; the only module in it is `__main__`."""

    def __init__(self, path):
        if not path.endswith(('.yaml', '.yml')):
            raise ImportError
        self.path = path

    def find_spec(self, name, target=None):
        if name != '__main__':
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self, origin=self.path)  # pyright: ignore[reportArgumentType]

    def get_code(self, name):
        return compile('from composer_kd.__main__ import run_script\nrun_script()\n', self.path, 'exec')


sys.path_hooks.append(_RecipeImporter)

"""Matthews' correlation coefficient, the metric of CoLA."""

import torch
from torchmetrics import Metric


class MatthewsCorrCoef(Metric):
    """The correlation of predicted and true classes, from -1 to 1 (Gorodkin 2004 for more than two classes).

    It is 0 where either is constant, as in scikit-learn: there is nothing to correlate. torchmetrics, for two classes,
    says something else there.

    Args:
        num_classes: number of classes.
    """

    full_state_update = False
    confusion: torch.Tensor

    def __init__(self, num_classes: int):
        super().__init__()
        self.add_state('confusion', torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx='sum')

    def update(self, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Count a batch: logits (batch, num_classes), class indices (batch,)."""
        classes = len(self.confusion)
        counts = torch.bincount(target * classes + logits.argmax(dim=1), minlength=classes**2)
        self.confusion += counts.view(classes, classes)

    def compute(self) -> torch.Tensor:
        """The coefficient over all batches."""
        confusion = self.confusion.double()
        true, predicted, total = confusion.sum(dim=1), confusion.sum(dim=0), confusion.sum()
        covariance = confusion.trace() * total - true @ predicted
        variances = (total**2 - true @ true) * (total**2 - predicted @ predicted)
        return torch.where(variances > 0, covariance / variances.sqrt(), 0.0).float()

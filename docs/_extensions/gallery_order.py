"""The order of the gallery: diagonals first, then covariances, then what is made with them."""

from sphinx_gallery.sorting import FunctionSortKey

ORDER = (
    "hessian_diagonal",
    "which_probes",
    "error_bars",
    "any_basis",
    "same_probes_anywhere",
    "curvature_of_a_loss",
    "covariance_of_your_denoiser",
    "few_steps",
    "flow_of_digits",
    "train_a_head",
    "attach_to_a_pipeline",
    "uncertainty_map",
    "inverse_problem",
    "likelihood",
    "reward_on_a_flow",
)


def place(file: str) -> int:
    """Where a script stands in the gallery.

    Raises:
        ValueError: If it is not in the order.
    """
    return ORDER.index(file.removesuffix(".py"))


key = FunctionSortKey(place, "the order of docs/_extensions/gallery_order.py")

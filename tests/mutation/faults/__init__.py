"""Planted faults: the tests are worth what they catch."""

from faults.attention import FAULTS as ATTENTION
from faults.commands import FAULTS as COMMANDS
from faults.core import FAULTS as CORE
from faults.covariances import FAULTS as COVARIANCES
from faults.evaluation import FAULTS as EVALUATION
from faults.kernels import FAULTS as KERNELS
from faults.likelihoods import FAULTS as LIKELIHOODS
from faults.sampling import FAULTS as SAMPLING
from faults.training import FAULTS as TRAINING

AREAS = {
    "kernels": KERNELS,
    "attention": ATTENTION,
    "core": CORE,
    "covariances": COVARIANCES,
    "sampling": SAMPLING,
    "likelihoods": LIKELIHOODS,
    "training": TRAINING,
    "evaluation": EVALUATION,
    "commands": COMMANDS,
}

"""Networks by name, built with plain BatchNorm."""

from batchless.models.build import build_any as build_any
from batchless.models.build import build_model as build_model
from batchless.models.cifar_resnet import CifarResNet as CifarResNet
from batchless.models.example import example_inputs as example_inputs
from batchless.models.fedbn import DigitsCNN as DigitsCNN
from batchless.models.fedbn import FedBNAlexNet as FedBNAlexNet

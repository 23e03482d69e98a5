"""Networks by name, built with plain BatchNorm."""

from batchless.models.build import build_model as build_model
from batchless.models.cifar_resnet import CifarResNet as CifarResNet

"""Networks by name, built with plain BatchNorm."""

from batchless.models.build import build_any as build_any
from batchless.models.build import build_model as build_model
from batchless.models.build import build_video as build_video
from batchless.models.cifar_resnet import CifarResNet as CifarResNet
from batchless.models.example import example_inputs as example_inputs
from batchless.models.fedbn import DigitsCNN as DigitsCNN
from batchless.models.fedbn import FedBNAlexNet as FedBNAlexNet
from batchless.models.temporal_shift import SegmentNetwork as SegmentNetwork
from batchless.models.temporal_shift import TemporalShift as TemporalShift
from batchless.models.temporal_shift import insert_temporal_shift as insert_temporal_shift
from batchless.models.temporal_shift import online as online
from batchless.models.temporal_shift import temporal_shift as temporal_shift

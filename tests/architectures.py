"""Architectures of torchvision, timm and segmentation_models_pytorch that conversions are tried on, without weights.

Every classification, segmentation, detection, video, quantizable and optical-flow builder of torchvision; one or more of
every timm family that has batch normalization; each decoder of segmentation_models_pytorch.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How to build one model and what its forward takes.

    `size`: side of its input images in pixels; `frames`: of a video, 0 for an image. `options` go to the builder.
    `detector`: takes a list of images, and targets in training. `pair`: takes two images and a number of updates.
    `precision`: the widest type it runs in.
    """

    name: str
    builder: Callable[..., nn.Module]
    size: int = 64
    frames: int = 0
    detector: bool = False
    pair: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    precision: torch.dtype = torch.float64

    def build(self) -> nn.Module:
        """The model with random weights, the same at every call."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own deprecations
            torch.manual_seed(0)
            return self.builder(**self.options)

    def arguments(self, samples: int, *, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """Positional arguments of an evaluation forward on `samples` random images."""
        images = self._images(samples, dtype, seed=1)
        if self.detector:
            return ([image.sigmoid() for image in images],)
        if self.pair:
            return (images.tanh(), self._images(samples, dtype, seed=2).tanh(), 2)
        return (images,)

    def training_arguments(self, samples: int) -> tuple[Any, ...]:
        """Positional arguments of a training forward."""
        arguments = self.arguments(samples)
        return (*arguments, [self._target() for _ in range(samples)]) if self.detector else arguments

    def _images(self, samples: int, dtype: torch.dtype, seed: int) -> Tensor:
        time = (self.frames,) if self.frames else ()
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(samples, 3, *time, self.size, self.size, generator=generator).to(dtype)

    def _target(self) -> dict[str, Tensor]:
        low, high = self.size // 4, self.size * 3 // 4
        mask = torch.zeros(1, self.size, self.size, dtype=torch.uint8)
        mask[:, low:high, low:high] = 1
        keypoints = torch.tensor([[[low + 1.0, low + 1.0, 1.0]] * 17])
        box = torch.tensor([[low, low, high, high]], dtype=torch.float32)
        return {"boxes": box, "labels": torch.ones(1, dtype=torch.long), "masks": mask, "keypoints": keypoints}


def _detector(name: str) -> dict[str, Any]:
    """Small images, two classes and few proposals."""
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 2 if "keypoint" in name else 3}
    if "rcnn" in name:
        options |= {"rpn_pre_nms_top_n_train": 40, "rpn_pre_nms_top_n_test": 40, "box_detections_per_img": 5}
        options |= {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 10}
    if not name.startswith("ssd"):  # these have one size
        options |= {"min_size": 128, "max_size": 128}
    return {"size": 128, "detector": True, "options": options}


def _torchvision_model(name: str, kind: str) -> Architecture:
    settings: dict[str, Any] = {"options": {"weights": None}}
    match kind:
        case "detection":
            settings = _detector(name)
        case "segmentation":
            settings["options"] |= {"weights_backbone": None, "num_classes": 3}
            settings["options"] |= {} if name.startswith("lraspp") else {"aux_loss": True}
        case "video":
            one_size = name == "s3d" or name.startswith("mvit")
            settings |= {"size": 224, "frames": 16} if one_size else {"frames": 8}
        case "optical_flow":
            settings |= {"size": 128, "pair": True, "precision": torch.float32}
    if name.startswith("vit_"):
        size = 70 if name == "vit_h_14" else 64
        settings |= {"size": size, "options": {"weights": None, "image_size": size}}
    if name.startswith("maxvit"):
        settings["size"] = 224
    if "inception_v3" in name:
        settings["size"] = 299
    if "inception_v3" in name or "googlenet" in name:
        settings["options"] |= {"init_weights": False}  # tens of seconds of truncated normals
    return Architecture(name=f"torchvision:{name}", builder=partial(torchvision.models.get_model, name), **settings)


def _torchvision() -> list[Architecture]:
    tasks = ("detection", "segmentation", "video", "optical_flow")
    modules = {task: getattr(torchvision.models, task) for task in tasks}
    kinds = {name: task for task, module in modules.items() for name in torchvision.models.list_models(module=module)}
    return [_torchvision_model(name, kinds.get(name, "classification")) for name in torchvision.models.list_models()]


TORCHVISION = _torchvision()

_TIMM_NAMES = """
resnet10t resnet18d resnext26ts resnetblur18 legacy_seresnet18 legacy_seresnext26_32x4d seresnext26t_32x4d
res2net50_14w_8s res2next50 skresnet18 resnest14d densenet121 densenetblur121d vgg11_bn
mobilenetv2_035 mobilenetv3_small_050 mobilenetv3_large_075 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium
efficientnet_b0 efficientnet_lite0 tf_efficientnet_b0 tf_efficientnetv2_b0 efficientnetv2_rw_t efficientnet_es
mixnet_s tf_mixnet_s mnasnet_small fbnetc_100 fbnetv3_b ghostnet_050 ghostnetv2_100 ghostnetv3_050
regnetx_002 regnety_002 regnetz_b16 regnetz_c16 rexnet_100 rexnetr_100 hrnet_w18_small dla46_c dla60_res2net dpn48b dpn68
legacy_xception xception41 xception41p inception_v3 inception_v4 inception_resnet_v2 nasnetalarge pnasnet5large
cspresnet50 cspresnext50 cspdarknet53 cs3darknet_s darknet17 darknet53 cspnext_tiny selecsls42b tresnet_m tresnet_v2_l
repvgg_a0 mobileone_s0 levit_128s levit_conv_128s efficientformer_l1 efficientformerv2_s0 convnext_atto
coatnet_bn_0_rw_224 coatnet_nano_rw_224 maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256
resnetv2_18 resnetv2_18d resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn
nf_resnet26 nf_regnet_b0 eca_nfnet_l0 dm_nfnet_f0
vovnet39a ese_vovnet19b_slim_dw ese_vovnet19b_slim eca_vovnet39b hardcorenas_a lcnet_035 lcnetv2_small tinynet_e
edgenext_xx_small mobilevit_xxs mobilevitv2_050 fastvit_t8 poolformer_s12 poolformerv2_s12
gernet_s ecaresnet26t ecaresnet50d_pruned resnetrs50 eca_botnext26ts_256 eca_halonext26ts lambda_resnet26t bat_resnext26ts
gcresnext26ts eca_resnext26ts haloregnetz_b lamhalobotnet50ts_256 sebotnet33ts_256
spnasnet_100 semnasnet_050 test_efficientnet test_efficientnet_ln test_byobnet test_resnet
hgnet_tiny hgnetv2_b0 repghostnet_050 repvit_m0_9 starnet_s050 shvit_s1 swiftformer_xs fasternet_t0 nextvit_small
efficientvit_b0 efficientvit_m0 efficientvim_m1 convmixer_768_32 visformer_tiny xcit_nano_12_p16_224 tiny_vit_5m_224
coat_lite_tiny convit_tiny inception_next_atto lowformer_b0 iformer_t rdnet_tiny csatv2 cpubone_nano mobilenetv5_base
vitamin_small_224 vit_tiny_r_s16_p8_224 vit_small_resnet26d_224 pvt_v2_b0 mambaout_femto gcvit_xxtiny
mvitv2_tiny nest_tiny sequencer2d_s test_vit caformer_s18 resnet50_clip resnet32ts resnet33ts resnet51q
"""

_TIMM_SIZES = {
    "inception_v3": 96,
    "inception_v4": 96,
    "inception_resnet_v2": 96,
    "efficientformer_l1": 224,
    "eca_halonext26ts": 256,
    "bat_resnext26ts": 256,
    "haloregnetz_b": 224,
    "lamhalobotnet50ts_256": 128,
}
"""Side of the images in pixels where 64 do not do."""

_BUILT_FOR_ONE_SIZE = """
levit_128s levit_conv_128s efficientformerv2_s0 coatnet_bn_0_rw_224 coatnet_nano_rw_224 maxvit_pico_rw_256
maxxvit_rmlp_nano_rw_256 eca_botnext26ts_256 lamhalobotnet50ts_256 sebotnet33ts_256 visformer_tiny coat_lite_tiny
convit_tiny vitamin_small_224 vit_tiny_r_s16_p8_224 vit_small_resnet26d_224 gcvit_xxtiny nest_tiny
"""


def _timm_model(name: str) -> Architecture:
    size = _TIMM_SIZES.get(name, 64)
    options: dict[str, Any] = {"pretrained": False, "num_classes": 10}
    if name in _BUILT_FOR_ONE_SIZE.split():
        options["img_size"] = size
    return Architecture(name=f"timm:{name}", builder=partial(timm.create_model, name), size=size, options=options)


TIMM = [_timm_model(name) for name in _TIMM_NAMES.split()]


def _segmentation_model(decoder: str, encoder: str) -> Architecture:
    options = {"encoder_name": encoder, "encoder_weights": None, "classes": 2}
    size = 512 if decoder == "PAN" else 64  # its pyramid ends in one channel, which needs more than one position
    return Architecture(name=f"smp:{decoder}-{encoder}", builder=getattr(smp, decoder), size=size, options=options)


_DECODERS = (
    "Unet",
    "UnetPlusPlus",
    "FPN",
    "PAN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "Linknet",
    "PSPNet",
    "MAnet",
    "UPerNet",
)
_ENCODERS = ("resnet18", "efficientnet-b0", "mobilenet_v2", "timm-regnetx_002")

SEGMENTATION_MODELS = [_segmentation_model(decoder, encoder) for decoder in _DECODERS for encoder in _ENCODERS]

HEAVY = frozenset(
    """
    smp:DeepLabV3-mobilenet_v2 smp:DeepLabV3Plus-efficientnet-b0 smp:DeepLabV3Plus-resnet18 smp:Linknet-timm-regnetx_002
    smp:MAnet-mobilenet_v2 smp:UnetPlusPlus-timm-regnetx_002 timm:bat_resnext26ts timm:convmixer_768_32 timm:cspresnet50
    timm:cspresnext50 timm:darknet53 timm:densenet121 timm:dla60_res2net timm:dm_nfnet_f0 timm:eca_botnext26ts_256
    timm:ghostnetv3_050 timm:haloregnetz_b timm:inception_resnet_v2 timm:inception_v4 timm:lamhalobotnet50ts_256
    timm:mobilenetv5_base timm:mobileone_s0 timm:nasnetalarge timm:pnasnet5large timm:regnety_002 timm:regnetz_b16
    timm:regnetz_c16 timm:resnet50_clip timm:resnet51q timm:resnetrs50 timm:rexnet_100 timm:selecsls42b
    timm:semnasnet_050 timm:tresnet_m timm:tresnet_v2_l timm:vgg11_bn timm:vit_small_resnet26d_224
    torchvision:convnext_base torchvision:convnext_large torchvision:densenet201 torchvision:efficientnet_b5
    torchvision:efficientnet_b6 torchvision:efficientnet_b7 torchvision:efficientnet_v2_l torchvision:efficientnet_v2_m
    torchvision:fasterrcnn_resnet50_fpn torchvision:fasterrcnn_resnet50_fpn_v2 torchvision:keypointrcnn_resnet50_fpn
    torchvision:maskrcnn_resnet50_fpn torchvision:maskrcnn_resnet50_fpn_v2 torchvision:maxvit_t torchvision:mvit_v1_b
    torchvision:mvit_v2_s torchvision:quantized_resnext101_32x8d torchvision:quantized_resnext101_64x4d
    torchvision:raft_large torchvision:regnet_x_16gf torchvision:regnet_x_32gf torchvision:regnet_x_8gf
    torchvision:regnet_y_128gf torchvision:regnet_y_16gf torchvision:regnet_y_32gf torchvision:regnet_y_8gf
    torchvision:resnet101 torchvision:resnet152 torchvision:resnext101_32x8d torchvision:resnext101_64x4d
    torchvision:retinanet_resnet50_fpn torchvision:retinanet_resnet50_fpn_v2 torchvision:ssd300_vgg16
    torchvision:swin3d_b torchvision:swin3d_s torchvision:swin3d_t torchvision:swin_b torchvision:swin_s
    torchvision:swin_v2_b torchvision:swin_v2_s torchvision:vgg11 torchvision:vgg11_bn torchvision:vgg13
    torchvision:vgg13_bn torchvision:vgg16 torchvision:vgg16_bn torchvision:vgg19 torchvision:vgg19_bn
    torchvision:vit_b_16 torchvision:vit_b_32 torchvision:vit_h_14 torchvision:vit_l_16 torchvision:vit_l_32
    torchvision:wide_resnet101_2 torchvision:wide_resnet50_2
    """.split()
)
"""Architectures whose conversion takes more than about 3 s to check on one core; the default run leaves them out."""

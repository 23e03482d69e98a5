"""Into other people's builders and trainers: timm and torchvision, Lightning, Accelerate, Hugging Face's Trainer."""

from batchless.adapters.norm_layers import norm_layer as norm_layer

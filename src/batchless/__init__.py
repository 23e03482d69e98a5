"""Train vision networks where batch statistics fail: one image per device, or one domain per client."""

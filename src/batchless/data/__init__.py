"""Datasets in the layouts people have on disk, the embedded handwriting, and batches from them."""

from batchless.data.augment import Augment as Augment
from batchless.data.dataset import ImageDataset as ImageDataset
from batchless.data.dataset import PooledImages as PooledImages
from batchless.data.dataset import Subset as Subset
from batchless.data.dataset import first_images as first_images
from batchless.data.dataset import open_images as open_images
from batchless.data.digit_domains import digit_domains as digit_domains
from batchless.data.domains import open_domains as open_domains
from batchless.data.loading import batches as batches
from batchless.data.loading import epoch_order as epoch_order
from batchless.data.mixing import Mix as Mix
from batchless.data.statistics import IMAGENET_STATISTICS as IMAGENET_STATISTICS
from batchless.data.statistics import ChannelStatistics as ChannelStatistics
from batchless.data.statistics import channel_statistics as channel_statistics

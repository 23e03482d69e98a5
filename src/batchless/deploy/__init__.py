"""A trained network at work: exported, evaluated, asked about images."""

from batchless.deploy.evaluation import EvaluateConfig as EvaluateConfig
from batchless.deploy.evaluation import evaluate_checkpoint as evaluate_checkpoint
from batchless.deploy.evaluation import evaluation_tables as evaluation_tables
from batchless.deploy.export import ExportConfig as ExportConfig
from batchless.deploy.export import Exported as Exported
from batchless.deploy.export import export_checkpoint as export_checkpoint
from batchless.deploy.folded import Folded as Folded
from batchless.deploy.folded import load_folded as load_folded
from batchless.deploy.image_prediction import predict_images as predict_images
from batchless.deploy.prediction import predict_checkpoint as predict_checkpoint
from batchless.deploy.prediction import prediction_table as prediction_table
from batchless.deploy.question import PredictConfig as PredictConfig
from batchless.deploy.question import Prediction as Prediction
from batchless.deploy.question import image_files as image_files

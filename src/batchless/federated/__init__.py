"""Federated learning: many clients, one domain each, one network that they share."""

from batchless.federated.config import FederateConfig as FederateConfig
from batchless.federated.config import ServerSettings as ServerSettings
from batchless.federated.data_settings import FederatedDataSettings as FederatedDataSettings
from batchless.federated.experiment import FinishedFederation as FinishedFederation
from batchless.federated.experiment import explain_federation as explain_federation
from batchless.federated.experiment import resume_federation as resume_federation
from batchless.federated.experiment import run_federation as run_federation
from batchless.federated.leave_one_out import leave_one_domain_out as leave_one_domain_out
from batchless.federated.rounds import RoundProgress as RoundProgress

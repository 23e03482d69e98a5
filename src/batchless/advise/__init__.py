"""Advice before training: what fails on few images (`diagnose`), and what a conversion would change."""

from batchless.advise.conversion import ConvertConfig as ConvertConfig
from batchless.advise.conversion import run_convert as run_convert
from batchless.advise.diagnosis import Diagnosis as Diagnosis
from batchless.advise.doctor import DoctorConfig as DoctorConfig
from batchless.advise.doctor import diagnose as diagnose
from batchless.advise.doctor import run_doctor as run_doctor
from batchless.advise.findings import Finding as Finding

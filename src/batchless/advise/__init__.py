"""Advice before training: what fails on few images (`diagnose`), what fits (`plan_memory`), what a conversion changes."""

from batchless.advise.conversion import ConvertConfig as ConvertConfig
from batchless.advise.conversion import run_convert as run_convert
from batchless.advise.diagnosis import Diagnosis as Diagnosis
from batchless.advise.doctor import DoctorConfig as DoctorConfig
from batchless.advise.doctor import diagnose as diagnose
from batchless.advise.doctor import run_doctor as run_doctor
from batchless.advise.findings import Finding as Finding
from batchless.advise.memory_plan import MemoryPlan as MemoryPlan
from batchless.advise.plan import PlanConfig as PlanConfig
from batchless.advise.plan import plan_memory as plan_memory
from batchless.advise.plan import run_plan as run_plan

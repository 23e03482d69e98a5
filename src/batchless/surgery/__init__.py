"""Change someone's model: give it another normalizer, fold it for deployment, re-estimate its statistics."""

from batchless.surgery.convert import conversion_of as conversion_of
from batchless.surgery.convert import convert as convert
from batchless.surgery.fold import fold as fold
from batchless.surgery.lean import LeanReport as LeanReport
from batchless.surgery.lean import lean as lean
from batchless.surgery.lean import require_lean_level as require_lean_level
from batchless.surgery.recalibrate import recalibrate as recalibrate
from batchless.surgery.report import ConversionReport as ConversionReport
from batchless.surgery.report import Entry as Entry

"""Study records: images, report sections, licence and, where known, the truth.

Later modules of this room add tables of studies and readers; the records know nothing about either.
"""

from sae_lens_maira.studies.study import Box, Finding, GroundedStatement, Licence, Study, StudyImage

__all__ = ["Box", "Finding", "GroundedStatement", "Licence", "Study", "StudyImage"]

"""Phrase table of the rule labeller: what radiologists write for the 14 usual observations, and the cues around it.

Every entry is a regular expression over lower-case text in which line breaks are blanks; a blank in a pattern
matches any run of white space or hyphens. The lists were written from reading reports and are ours. This module
knows nothing about scope: which cue governs which phrase is the labeller's business.
"""

from __future__ import annotations

OBSERVATIONS = (
    "no_finding",
    "enlarged_cardiomediastinum",
    "cardiomegaly",
    "lung_opacity",
    "lung_lesion",
    "edema",
    "consolidation",
    "pneumonia",
    "atelectasis",
    "pneumothorax",
    "pleural_effusion",
    "pleural_other",
    "fracture",
    "support_devices",
)
"""The 14 observations, in the usual order."""

_HEART = (
    r"(?:heart|cardiac silhouette|cardiac size|cardiac contours?|cardiac shadow|cardiopericardial silhouette)"
)

PHRASES: dict[str, tuple[str, ...]] = {
    "enlarged_cardiomediastinum": (
        r"(?:widened|widening of the|enlarged|enlargement of the|wide) (?:\w+ ){0,2}(?:cardio)?mediastin\w+",
        r"(?:cardio)?mediastin\w+ (?:[\w']+ ){0,5}?(?:widened|widening|enlarged|enlargement|prominent)",
    ),
    "cardiomegaly": (
        r"cardiomegaly",
        rf"{_HEART}(?: size)? (?:(?!normal)[\w']+ ){{0,5}}?(?:enlarged|enlargement)",
        r"(?:enlarged|enlargement of the|enlargement of) (?:\w+ ){0,2}?" + _HEART,
        r"cardiac enlargement",
        rf"{_HEART} (?:is|isn't|remains|appears|does not appear|doesn't appear) (?:\w+ )?(?:large|prominent|big)",
        r"large heart",
        r"(?:increased|increase in) (?:heart|cardiac) size",
    ),
    "lung_opacity": (
        r"opacit(?:y|ies)",
        r"opacifications?",
        r"opacified",
        r"infiltrates?",
        r"airspace disease",
        r"air space disease",
        r"reticulation",
        r"interstitial markings",
        r"haziness",
    ),
    "lung_lesion": (
        r"nodul(?:e|es|ar densit\w+)",
        r"(?:lung|pulmonary|hilar|perihilar|lobe) mass(?:es)?",
        r"mass(?:es)?(?! effect)",
        r"granulomas?",
        r"cavitary lesions?",
        r"lung lesions?",
        r"tumou?rs?",
        r"metastas[ei]s",
    ),
    "edema": (
        r"o?edema",
        r"(?:heart|cardiac|ventricular) failure",
        r"chf",
        r"fluid overload",
        r"volume overload",
    ),
    "consolidation": (r"consolidat(?:ions?|ed|ive)", r"consolidating"),
    "pneumonia": (
        r"(?:broncho)?pneumonias?",
        r"pneumonic",
        r"(?:superimposed |pulmonary )?infections?",
        r"infectious (?:process|etiolog\w+|infiltrates?|consolidation)",
    ),
    "atelectasis": (
        r"atelecta\w+",
        r"(?:lung|lobar|lobe|lobes) collapse",
        r"collapse of the (?:\w+ ){0,3}(?:lobe|lung)s?",
        r"collapsed (?:\w+ )?(?:lung|lobe)",
    ),
    "pneumothorax": (r"pneumothora(?:x|ces)", r"hydropneumothora(?:x|ces)", r"ptx"),
    "pleural_effusion": (
        r"(?<!pericardial\s)(?<!joint\s)effusions?",
        r"pleural fluid",
        r"hydrothorax",
        r"hydropneumothora(?:x|ces)",
        r"fluid in the (?:\w+ )?(?:fissures?|pleural space)",
    ),
    "pleural_other": (
        r"pleural (?:\w+ )?(?:thickening|plaques?|scarring|calcifications?)",
        r"(?:apical|biapical) thickening",
        r"fibrothorax",
    ),
    "fracture": (r"(?:micro)?fractures?", r"fractured"),
    "support_devices": (
        r"(?:et|ng|og|endotracheal|nasogastric|orogastric|enteric|feeding|dobbhoff|tracheostomy|chest) tubes?",
        r"dobbhoff",
        r"tracheostomy",
        r"(?:picc|central|jugular|subclavian|ij|dialysis|swan ganz|venous) (?:\w+ )?(?:lines?|catheters?)",
        r"picc",
        r"catheters?",
        r"pacemakers?",
        r"pacer",
        r"(?:icd|aicd)",
        r"(?:pacemaker|pacer|icd) leads?",
        r"port a cath",
        r"(?:sternotomy|sternal) wires",
        r"pigtail",
        r"(?:prosthetic|replaced) (?:\w+ )?valve",
    ),
}
"""Mentions. Whether one is affirmed is decided from the cues around it."""

ABSENT_PHRASES: dict[str, tuple[str, ...]] = {
    "cardiomegaly": (
        rf"{_HEART}(?: size)? (?:(?!enlarged)\w+ ){{0,5}}?(?:normal|unremarkable)",
        r"(?:normal|unremarkable) (?:heart|cardiac) (?:size|silhouette)",
        rf"{_HEART}(?: size)? (?:is|are) not enlarged",
    ),
    "enlarged_cardiomediastinum": (
        r"(?:cardio)?mediastin\w+(?: (?!enlarged|widened)\w+){0,5}? (?:normal|unremarkable)",
        r"(?:normal|unremarkable) (?:cardio)?mediastin\w+",
    ),
    "lung_opacity": (r"lungs (?:\w+ ){0,3}clear", r"clear lungs"),
}
"""Phrases that deny an observation without a negation cue."""

NORMAL_PHRASES = (
    r"(?:within )?normal limits",
    r"(?:is|are|appears?|remains?) (?:\w+ )?(?:normal|clear|unremarkable)",
    r"no (?:acute|active|significant|new|focal)",
    r"unchanged",
    r"lungs? (?:\w+ ){0,3}(?:clear|well (?:expanded|inflated|aerated))",
    r"intact",
    r"(?:clear|normal) (?:lungs?|chest|heart)",
    r"no acute (?:\w+ ){0,2}(?:process|abnormalit\w+|disease|findings?)",
    r"normal (?:chest|radiograph|study|examination)",
    r"unremarkable (?:chest|radiograph|study|examination)",
)

PSEUDO_NEGATION = (
    r"no (?:\w+ )?(?:interval |significant |appreciable |relevant |substantial |definite )*change",
    r"not significantly changed",
    r"no (?:further )?(?:increase|decrease|improvement|progression|difference)",
    r"without (?:\w+ ){0,2}change",
    r"not only",
    r"not necessarily",
    r"no longer enlarging",
    r"(?:near(?:ly)?|almost|incomplete(?:ly)?|partial(?:ly)?|mostly|largely"
    r"|not(?: yet| been| fully| completely| entirely)*)"
    r" (?:complete(?:ly)? |entire(?:ly)? )?(?:resol\w+|clear\w+|disappear\w+)",
    r"(?:resolved|cleared) (?:almost|nearly|partially|incompletely|in part|for the most part)",
    r"not (?:yet |been )*(?:removed|withdrawn|taken out)",
)
"""Look like negations, deny nothing about what follows."""

NEGATION_BEFORE = (
    r"no",
    r"not?(?: \w+){0,2} (?:evidence|sign|signs) of",
    r"without",
    r"w/o",
    r"free of",
    r"free from",
    r"clear of",
    r"absence of",
    r"negative for",
    r"neither",
    r"nor",
    r"never",
    r"(?:resolved|resolution of|clear(?:ing|ance) of)",
    r"(?:not|\w+n't) (?:see|seen|identify|demonstrate|show|have|appear|reveal|detect|any)",
    r"(?:is|are|was|were)n't",
    r"unlikely",
    r"rather than",
    r"(?:has|have|is) not",
    r"(?:excludes|excluded|ruled out)",
)
NEGATION_AFTER = (
    r"(?:(?:is|are|was|were) (?:not|no longer)|(?:is|are|was|were)n't) (?:\w+ ){0,2}"
    r"(?:seen|identified|present|visuali[sz]ed|visible|detected|apparent|evident|demonstrated)",
    r"(?:is|are) not(?=\s*(?:[.,;]|$))",
    r"no longer (?:\w+ )?(?:seen|identified|present|visuali[sz]ed|visible|evident|in place)",
    r"(?:has|have) (?:\w+ )?(?:resolved|cleared|disappeared)",
    r"(?:is|are) (?:\w+ )?(?:absent|resolved|excluded|ruled out)",
    r"not (?:\w+ )?(?:seen|identified|visualized|detected)",
)
# Read as present, since they state more than even odds: "likely", "probably", "suggesting", "suspicious for",
# "concerning for", "worrisome for", "suspected". Uncertain: what is named as one possibility, or not excluded.
UNCERTAIN_BEFORE = (
    r"(?:no longer )?less likely",
    r"query",
    r"to (?:\w+ )?(?:exclude|rule out)",
    r"either",
    r"(?:versus|vs\.?)",
    r"may(?:be)?",
    r"might",
    r"could",
    r"possib(?:le|ly|ility of)",
    r"potential(?:ly)?",
    r"suspicion (?:of|for)",
    r"concern (?:for|of)",
    r"question(?:able)?(?: of)?",
    r"equivocal",
    r"(?:cannot|can not|can't) (?:\w+ )?(?:exclude|rule out)",
    r"(?:not|difficult to|unable to) (?:\w+ )?(?:exclude|rule out|excluded)",
    r"if (?:there is|clinical)",
    r"differential",
    r"(?:evaluate|eval|assess|assessment|evaluation|look|check|r/o|rule out|please) (?:for|of)?",
    r"(?:raise|raises|raising) (?:\w+ ){0,3}(?:possibility|concern|question)",
    r"(?:can|should) be considered",
)
UNCERTAIN_AFTER = (
    r"(?:cannot|can not|can't|could not|couldn't|not) (?:\w+ ){0,3}(?:excluded|ruled out|entirely exclude)",
    r"(?:is|are) (?:\w+ )?(?:possible|not excluded|questionable|difficult to exclude)",
    r"(?:should|could|may|might) be (?:\w+ )?(?:considered|present|suspected)",
    r"(?:versus|vs)",
    r"(?:is|are) (?:a|in the) (?:\w+ )?(?:consideration|differential|possibility|concern)",
    r"would be difficult to exclude",
)
LESS_LIKELY_AFTER = (r"less likely", r"not (?:as |so )?likely")
UNLIKELY_AFTER = (r"unlikely", r"not (?:thought|felt) to be present")
"""Read behind a mention and before the next comma."""

REMOVED_BEFORE = (r"(?:removal|withdrawal|explantation|discontinuation) of", r"(?:removed|explanted)")
REMOVED_AFTER = (
    r"(?:has|have|had|was|were|is|are|been) (?:\w+ ){0,2}(?:removed|taken out|explanted|discontinued)",
    r"(?:has|have|had|was|were|been) (?:\w+ ){0,2}withdrawn(?! (?:by|to|slightly|\d))",
    r"(?:removed|removal|explanted)",
)
"""Cues that a device is no longer in place."""

VALUE_ABSENT = r"\s*:\s*(?:none|no(?=\s*(?:[.,;\n]|$))|absent|negative|nil|not (?:present|seen)|none seen)\b"
VALUE_UNCERTAIN = r"\s*:\s*(?:possibl[ey]|questionable|equivocal|\?|uncertain|maybe)"
"""What a list writes behind the name of a finding."""

NO_STATEMENT_BEFORE = (
    r"history",
    r"(?:man|woman|male|female|patient|pt|m|f) with",
)
"""What is known of the patient before the image was read."""
LIMITED = (
    r"(?:limit\w*|reduc\w*|decreas\w*|insensitive|not sensitive|low|poor|difficult|suboptimal|preclud\w*|hinder\w*"
    r"|compromis\w*|lower\w*|diminish\w*|impair\w*)"
)
TASK = r"(?:sensitiv\w*|insensitive|detect\w*|evaluat\w*|assess\w*|exclu(?:sion|ding)|ability)"
"""A clause with both, the task before the mention, describes the technique and states nothing about the finding."""

TERMINATION = (
    r"but",
    r"however",
    r"although",
    r"though",
    r"aside from",
    r"apart from",
    r"except(?: for)?",
    r"other than",
    r"which",
    r"due to",
    r"secondary to",
    r"and there (?:is|are)",
    r"(?<!no\s)there (?:is|are|has|remains)",
    r"with (?:\w+ )?(?:small|moderate|large|mild|stable|unchanged|persistent|associated)",
)
SIZE_WORDS = (
    r"(?:small|moderate|large|mild|severe|stable|unchanged|persistent|bilateral|minimal|tiny|trace|increas\w+"
    r"|there|the|left|right|bibasilar|low|mildly|moderately)"
)
SILENT_SECTIONS = (
    r"indication|history|clinical (?:history|information|indication)|reason for (?:exam\w*|study)|technique"
    r"|comparisons?|exam(?:ination)?|study|procedure|type of examination|chief complaint|clinical"
)
"""Headers of sections that ask or describe, and state nothing about this image."""

# Words that decide whether a text is English: its function words, and those of other languages. Words that several of
# them share ("no", "in", "a", "is", "normal", "et" of "ET tube") decide nothing.
ENGLISH = frozenset(
    """
    the are were not of and or there with without for at this that has have been be seen on
    to by from it may clear left right small stable unchanged new evidence
    """.split()  # noqa: SIM905 - one word per item would take a hundred lines
)
FOREIGN = frozenset(
    """
    el la los las de del se sin con y en un una por que al derecho izquierdo derecha izquierda der die
    das und kein keine keinen nicht ist sind mit ohne im ein eine le les des du est sont pas sans
    avec une dans gauche droit il lo gli di e non sono senza na os da em com sem ao het een van
    geen niet
    """.split()  # noqa: SIM905 - one word per item would take a hundred lines
)

"""Phrases of the rule labeller: what radiologists write for the 14 usual observations.

Every entry is a regular expression over lower-case text in which line breaks are blanks; a blank in a pattern matches
any run of white space, hyphens or colons. `cues` lists the words around a phrase that affirm, doubt or deny it.
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
    r"(?:heart(?: silhouettes?| shadow| contours?)?|cardiac (?:silhouettes?|size|contours?|shadow|diameter)"
    r"|cardiopericardial silhouette|cardiothoracic ratio)"
)
_WORD = r"(?:(?!and\b|or\b|nor\b|but\b|with\b|without\b|no\b(?! longer))[\w']+ )"
"""A word that does not begin another part of the sentence."""
_LARGE = (
    r"(?:enlarged|enlargement|widened|widening|wide|wider|larger|broad|broadened|dilated"
    r"|increased(?! since)|above normal|(?:more|greater) than (?:half|normal))"
)

PHRASES: dict[str, tuple[str, ...]] = {
    "enlarged_cardiomediastinum": (
        r"(?:widened|widening of the|enlarged|enlargement of(?: the)?|wide)"
        rf" (?:{_WORD}{{0,2}}|(?:heart|cardiac) and )(?:cardio)?mediastin\w+",
        rf"(?:cardio)?mediastin\w+ (?:{_WORD}|(?:n?either|nor|with|and) ){{0,6}}?(?:{_LARGE}|prominent)",
    ),
    "cardiomegaly": (
        r"cardiomegaly",
        rf"{_HEART}(?: size)? (?:(?!normal){_WORD}){{0,6}}?{_LARGE}",
        rf"(?:enlarged|enlargement of the|enlargement of) {_WORD}{{0,2}}?{_HEART}",
        r"cardiac enlargement",
        rf"{_HEART} and mediastin\w+ {_WORD}{{0,4}}?{_LARGE}",
        r"(?:enlarged|enlargement of the) (?:heart|cardiac) and mediastin\w+",
        rf"{_HEART} (?:is|isn't|remains|appears|does not appear|doesn't appear) (?:\w+ )?"
        r"(?:large|prominent|big|globular)",
        r"(?:large|big) heart",
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
        r"(?:et|ng|og|endotracheal|nasogastric|orogastric|enteric|nasoenteric|feeding|dobb?hoff|chest) tubes?",
        r"dobb?hoff",
        r"(?:ett|ngt|ogt|cvc|iabp)",
        r"swan ganz",
        r"(?:balloon pump|defibrillator|(?:mediastinal|pleural|chest) drains?)",
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
        rf"{_HEART}(?: size)? (?:(?!enlarged|above|greater|more)\w+ ){{0,5}}?(?:normal|unremarkable)",
        rf"{_HEART}(?: size)? {_WORD}{{0,5}}?(?:top normal|upper limits? of normal)",
        r"(?:normal|unremarkable) (?:heart|cardiac) (?:size|silhouette)",
        rf"{_HEART}(?: size)?,? (?:[\w']+ ){{0,4}}(?:normal,? )?(?:[\w']+ )?(?:not|non) (?:\w+ )?{_LARGE}",
    ),
    "enlarged_cardiomediastinum": (
        r"(?:cardio)?mediastin\w+(?: (?!enlarged|widened)\w+){0,5}? (?:normal|unremarkable)",
        r"(?:normal|unremarkable) (?:cardio)?mediastin\w+",
    ),
    "lung_opacity": (r"lungs (?:\w+ ){0,3}clear", r"clear lungs"),
}
"""Phrases that deny an observation without a negation cue."""

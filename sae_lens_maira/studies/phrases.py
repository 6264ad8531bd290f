"""Phrases of the rule labeller: what radiologists write for the 14 usual observations.

Every entry is a regular expression over lower-case text in which line breaks are blanks. A blank in a pattern matches
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
    r"(?:heart(?:'s| silhouettes?| shadow| contours?)?|cardiac (?:silhouettes?|size|contours?|shadow|diameter"
    r"|outline)"
    r"|cardiopericardial silhouette|cardiothoracic (?:ratio|index))"
)
_WORD = r"(?:(?!and\b|or\b|nor\b|but\b|with\b|without\b|no\b(?! longer))[\w']+ )"
"""A word that does not start another part of the sentence."""
_LARGE = (
    r"(?:enlarged|enlarging|enlargement|widened|widening|wide|wider|larger|broad|broadened|dilated"
    r"|increased(?! since)|above normal|(?:more|greater) than (?:half|normal))"
)
_IS = r"(?:is|isn't|remains?|appears?|looks?|seems?|(?:does not|doesn't) (?:appear|look|seem))"
_LUNG = r"(?:lungs?|pulmonary|hilar|perihilar|parenchymal|lobe|bronchogenic)"

PHRASES: dict[str, tuple[str, ...]] = {
    "enlarged_cardiomediastinum": (
        r"(?:widened|widening of(?: the)?|enlarged|enlargement of(?: the)?|wide|prominent|broadened"
        r"|broadening of(?: the)?)"
        rf" (?:{_WORD}{{0,2}}|(?:heart|cardiac) and )(?:cardio)?mediastin(?:um|al)\b(?! (?:lymph\w*|node\w*"
        rf"|adeno\w+|vein\w*|mass\w*))",
        rf"(?:cardio)?mediastin(?:um|al)\b(?! (?:lymph\w*|node\w*|adeno\w+|vein\w*|mass\w*)) "
        rf"(?:{_WORD}|(?:n?either|nor|with|and) ){{0,6}}?(?:{_LARGE}|prominent)",
    ),
    "cardiomegaly": (
        r"cardiomegaly",
        rf"{_HEART}(?: size)? (?:(?!normal)(?:{_WORD}|(?:and|but) (?=remains?|is|appears?|again"
        rf"|still))){{0,6}}?{_LARGE}",
        rf"(?:enlarged|enlargement of the|enlargement of|enlarging) {_WORD}{{0,2}}?{_HEART}",
        rf"{_HEART},? which (?:is|are|remains?|appears?) {_WORD}{{0,3}}?{_LARGE}",
        r"cardiac enlargement",
        rf"(?:{_HEART}|cardiac) and mediastin\w+ {_WORD}{{0,4}}?{_LARGE}",
        r"(?:enlarged|enlargement of the) (?:heart|cardiac) and mediastin\w+",
        rf"{_HEART} {_IS} (?:\w+ ){{0,2}}?(?:large|prominent|big|globular)",
        rf"(?:large|big|prominent|globular) {_HEART}",
        rf"(?:increased?|increase in|increasing) (?:the )?(?:size of )?(?:the )?{_HEART}",
    ),
    "lung_opacity": (
        r"opacit(?:y|ies)",
        r"opacifications?",
        r"opacified",
        r"infiltrates?",
        r"(?:airspace|air space|alveolar) (?:disease|process|abnormalit\w+|changes?)",
        r"reticulation",
        r"interstitial markings",
        r"haziness",
        r"ground glass(?! nodul\w+)",
        r"(?:increased|hazy|patchy|airspace|parenchymal|streaky|ill defined) densit(?:y|ies)",
    ),
    "lung_lesion": (
        r"nodul(?:e|es|ar densit\w+)",
        rf"{_LUNG} mass(?:es)?",
        r"mass(?:es)?(?! effect)",
        r"granulomas?",
        rf"(?:{_LUNG}|cavitary|cavitating|spiculated) lesions?",
        r"tumou?rs?",
        r"metastas[ei]s",
        rf"{_LUNG} (?:cancers?|carcinomas?|malignanc(?:y|ies)|neoplasms?)",
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
        r"pna",
        r"(?:superimposed |pulmonary )?infections?",
        r"infectious (?:process|etiolog\w+|infiltrates?|consolidation)",
    ),
    "atelectasis": (
        r"(?:micro)?atelecta(?:sis|ses|tic)",
        r"(?:lung|lobar|lobe|lobes|segmental|basilar|retrocardiac|upper|lower) collapse",
        r"(?<!vertebral\s)(?<!body\s)(?<!endplate\s)collapse(?! of (?:the |a )?(?:\w+ )?(?:vertebra\w*|t\d|l\d))",
        r"collapsed (?:\w+ )?(?:lung|lobe)",
    ),
    "pneumothorax": (r"(?:hydro|haemo|hemo)?pneumothora(?:x|ces)", r"ptx"),
    "pleural_effusion": (
        r"(?<!pericardial\s)(?<!joint\s)effusions?",
        r"pleural (?:fluid|collections?)",
        r"(?:hydro|haemo|hemo)thora(?:x|ces)",
        r"empyema",
        r"(?:hydro|haemo|hemo)pneumothora(?:x|ces)",
        r"(?:loculated|layering|subpulmonic) fluid",
        r"fluid in the (?:\w+ )?(?:fissures?|pleural space)",
    ),
    "pleural_other": (
        r"pleural (?:\w+ )?(?:thickening|plaques?|scar(?:s|ring)?|calcifications?|fibrosis)",
        r"pleur(?:al|o)(?: |/)parenchymal (?:\w+ )?(?:scar(?:s|ring)?|thickening)",
        r"(?:apical|biapical) (?:thickening|caps?|capping)",
        r"thickening of the (?:\w+ )?pleura",
        r"fibrothorax",
        r"(?<=effusion/)thickening",
    ),
    "fracture": (r"(?:micro)?fractures?", r"fractured", r"fxs?"),
    "support_devices": (
        r"(?:et|ng|og|nj|endotracheal|nasogastric|orogastric|enteric|nasoenteric|nasojejunal|feeding|gastric"
        r"|gastrostomy"
        r"|peg|dobb?hoff|chest|thoracostomy|pleural|tracheal|tracheostomy|trach|drainage|suction)"
        r" (?:suction |drainage )?tubes?",
        r"dobb?hoff",
        r"(?:ett|ngt|ogt|cvc|cvl|iabp|lvad|ecmo|impella|mediport)",
        r"swan ganz",
        r"balloon pump",
        r"(?:implantable |cardioverter )*defibrillator",
        r"(?:mediastinal|pleural|chest|pericardial|thoracic|surgical|pigtail) drains?",
        r"pleurx(?: catheter)?",
        r"tracheostomy",
        r"(?:picc?|central|jugular|subclavian|ij|dialysis|swan ganz|venous|femoral|arterial|tunnell?ed|hickman"
        r"|access)"
        r" (?:\w+ )?(?:lines?|catheters?|sheaths?)",
        r"picc",
        r"catheters?",
        r"(?:introducer|vascular|venous) sheaths?",
        r"pacemakers?",
        r"pacer",
        r"(?:temporary )?pac(?:ing|er|emaker) (?:wires?|leads?|electrodes?|device)",
        r"(?:a?icd)(?: leads?)?",
        r"port a cath",
        r"portacath",
        r"(?:chest|infusion|venous) port",
        r"(?:sternotomy|sternal|cerclage) wires",
        r"pigtail",
        r"(?:ventricular )?assist device",
        r"(?:ecmo|venous|arterial) cannulas?e?",
        r"(?:lines? (?:and|or) tubes?|tubes? (?:and|or) lines?|lines?/tubes?|tubes?/lines?)",
        r"(?:(?:support|supportive|monitoring)(?: and | or |/)?){1,2} (?:devices?|apparatus|equipment|hardware"
        r"|lines?|tubes?)",
        r"(?:the|this) (?:tube|lines?(?= (?:is|ends?|terminat\w+|tip)))",
        r"(?:prosthetic|replaced) (?:\w+ )?valve",
        r"valve (?:prosthes[ie]s|replacements?)",
    ),
}
"""Observation -> phrases that mention it. The cues around a mention decide whether it is affirmed."""

ABSENT_PHRASES: dict[str, tuple[str, ...]] = {
    "cardiomegaly": (
        rf"{_HEART}(?: size)? (?:(?!enlarged|above|greater|more)\w+ ){{0,6}}?(?:normal|unremarkable)",
        rf"(?:{_HEART}|cardiac)(?:,? and |, | / |/)(?:the )?(?:\w+ and )?mediastin\w+"
        r" (?:(?!enlarged|widened)\w+ ){0,5}?(?:normal|unremarkable)",
        rf"{_HEART}(?: size)? {_WORD}{{0,5}}?(?:top normal|upper limits? of normal)",
        r"(?:normal|unremarkable) (?:heart|cardiac) (?:size|silhouette|contours?)",
        rf"{_HEART}(?: size)?,? (?:[\w']+ ){{0,4}}(?:normal,? )?(?:[\w']+ )?(?:not|non) (?:\w+ )?(?:{_LARGE}|large"
        rf"|big)",
    ),
    "enlarged_cardiomediastinum": (
        r"(?:cardio)?mediastin(?:um|al)(?: (?!enlarged|widened)\w+){0,6}? (?:normal|unremarkable)",
        r"(?:normal|unremarkable) (?:(?:heart|cardiac)(?: size| silhouette)?(?: and "
        r"|, ))?(?:cardio)?mediastin(?:um|al)",
    ),
    "lung_opacity": (r"lungs (?:\w+ ){0,3}clear", r"clear lungs"),
}
"""Phrases that deny an observation without a negation cue."""

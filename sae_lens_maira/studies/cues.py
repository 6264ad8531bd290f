"""Cues of the rule labeller: the words around a phrase that affirm, doubt or deny it.

Regular expressions over lower-case text as in `phrases`. Most lists come in pairs: a cue BEFORE a mention
reaches forward, a cue AFTER it reaches back. `labels` decides how far, and which cue wins.
"""

NORMAL_PHRASES = (
    r"(?:within )?normal limits",
    r"(?:is|are|appears?|remains?) (?:\w+ )?(?:normal|clear|unremarkable)",
    r"no (?:acute|active|significant|focal)",
    r"lungs? (?:\w+ ){0,3}(?:clear|well (?:expanded|inflated|aerated))",
    r"intact",
    r"(?:clear|normal) (?:lungs?|chest|heart)",
    r"no acute (?:\w+ ){0,2}(?:process|abnormalit\w+|disease|findings?)",
    r"(?:normal|unremarkable) (?:chest|radiograph|study|examination|lungs?)",
)
"""A text that states one of these and no observation is normal; a text without either is unknown."""

_GONE = r"(?:resol(?:ution|v\w+)|clear(?:ing|ance|ed)|disappear\w*)"
_PARTLY = (
    r"(?:near(?:ly)?|almost|incomplete(?:ly)?|partial(?:ly)?|partly|mostly|largely|substantial(?:ly)?|significant(?:ly)?|some"
    r"|continu\w+|ongoing|further|progressive|gradual(?:ly)?|slow(?:ly)?|early|moderate|interval partial"
    r"|not(?: yet| been| fully| completely| entirely)*)"
)
PSEUDO_NEGATION = (
    r"no (?:\w+ )?(?:interval |significant |appreciable |relevant |substantial |definite )*changes?",
    r"not (?:significantly |substantially |appreciably )?(?:changed|different)",
    r"no (?:further )?(?:increase|decrease|improvement|progression|difference)",
    r"(?:do|does|did|has|have) not (?:significantly )?"
    r"(?:changed?|increased?|decreased?|improved?|progress\w*|worsen\w*)",
    r"without (?:\w+ ){0,2}change",
    rf"without (?:yet )?(?:complete|full|total|entire) {_GONE}",
    r"not only",
    r"(?:no|without|beyond|little) doubt",
    r"not necessarily",
    r"no longer enlarging",
    rf"{_PARTLY} (?:(?:but|and|though) \w+ )?(?:interval )?(?:complete(?:ly)? |total(?:ly)? |entire(?:ly)? )?{_GONE}",
    rf"\w+n't (?:yet |been |fully |completely |entirely )*{_GONE}",
    rf"{_GONE} (?:almost|nearly|partially|incompletely|in part|for the most part|slowly|gradually|as expected)",
    r"(?:is|are|be) (?:resolving|clearing)",
    r"(?:until|ensure|document|confirm|follow|monitor|to) (?:\w+ ){0,2}(?:resolution|clearing)",
    r"(?:almost|nearly|mostly|largely) (?:\w+ )?gone",
    r"not (?:yet |been )*(?:removed|withdrawn|taken out|pulled)",
    r"(?:could|can|should|may|might|to|consider|recommend\w*|suggest\w*|advise\w*|before|prior to|pending)"
    r" (?:be |the |its )*(?:remov(?:ed|al)|withdrawn|withdrawal|pulled|discontinued)",
    r"not (?:well|fully|completely|entirely|optimally|adequately) (?:seen|visuali[sz]ed|evaluated|assessed|included)",
)
"""Look like negations, deny nothing about what follows."""

SHOWN = (
    r"(?:seen|identified|present|visuali[sz]ed|visible|detected|apparent|evident|demonstrated|appreciated|noted"
    r"|recogni[sz]ed|found|observed|shown)"
)
NEGATION_BEFORE = (
    r"no (?:\w+ )?(?:evidence|signs?|suggestion|indication)(?: of)?",
    r"no",
    r"not?(?: \w+){0,2} (?:evidence|sign|signs|suggestion|indication) of",
    r"without",
    r"w/o",
    r"free of",
    r"free from",
    r"(?:clear|devoid) of",
    r"(?:absence|lack|disappearance) of",
    r"negative for",
    r"neither",
    r"nor",
    r"never",
    r"nothing (?:\w+ ){0,2}(?:to|suggest\w*|that)",
    r"(?:resolved|resolution of|clear(?:ing|ance) of)",
    r"(?:do|does|did|could|can|would) not (?:\w+ )?(?:\w+)",
    r"(?:do|does|did|could|ca|wo|would)n't (?:\w+ )?(?:\w+)",
    r"fail(?:s|ed)? to \w+",
    r"(?:cannot|can't|unable to) (?:\w+ )?(?:see|identify|find|detect|appreciate|demonstrate|recogni[sz]e)",
    r"(?:it is|it's|this is|these are) not",
    r"(?:nowhere|not (?:an?|due|from|related))",
    r"(?:not|\w+n't) (?:see|seen|identify|demonstrate|show|have|appear|reveal|detect|any)",
    r"(?:is|are|was|were)n't",
    r"unlikely (?:to|due|related|that|for|given)",
    r"(?<![a-z]\s)unlikely",
    r"an? unlikely",
    r"(?:rather|more likely|more probable) than",
    r"(?:instead of|as opposed to)",
    r"(?:has|have|is) not",
    r"not (?:\w+ )?(?:suspicious|concerning|suggestive|typical|characteristic|consistent|compatible|worrisome"
    r"|diagnostic|indicative|convincing|representative) (?:for|of|with)",
    r"(?:excludes|excluded|rules out|ruled out)",
    r"doubt(?:ful)?(?: for| of)?",
    r"(?:improbable|implausible)(?: that| for| to)?",
    r"low (?:clinical )?(?:likelihood|probability|suspicion|concern|chance) (?:of|for)",
)
NEGATION_AFTER = (
    rf"nowhere (?:to be )?{SHOWN}",
    rf"(?:(?:is|are|was|were) (?:not|no longer)|(?:is|are|was|were)n't) (?:\w+ ){{0,2}}{SHOWN}",
    rf"(?:could|can) ?(?:not|n't) be (?:\w+ )?{SHOWN}",
    rf"(?:couldn't|can't) be (?:\w+ )?{SHOWN}",
    r"(?:is|are) not(?=\s*(?:[.,;]|$))",
    rf"no longer (?:\w+ )?(?:{SHOWN}|in place|there)",
    r"(?:has|have|had) (?:\w+ ){0,2}(?:resolved|cleared|disappeared|gone|vanished)",
    r"(?:has|have|had|did) not (?:\w+ )?(?:developed?|recur\w*|appear\w*|occur\w*|formed?|re-?accumulated?)",
    r"(?:has|have|had|did)n't (?:\w+ )?(?:developed?|recur\w*|appear\w*|occur\w*|formed?|re-?accumulated?)",
    r"(?:is|are|was|were|has been|have been) (?:\w+ )?(?:absent|resolved|excluded|ruled out|gone)",
    rf"not (?:\w+ )?{SHOWN}",
    r"(?:resolved|cleared)(?=\s*(?:[.,;]|$)| (?:since|after|following|in|completely|entirely|by|now)\b)",
)
# Read as present, since they state more than even odds: "likely", "probably", "suggesting", "suspicious for",
# "concerning for", "worrisome for", "suspected". Uncertain: what is named as one possibility, or not excluded.
_EXCLUDE = r"(?:exclude[ds]?|excluding|rule[ds]? out|ruling out)"
UNCERTAIN_BEFORE = (
    r"(?<!is\s)(?<!are\s)(?<!felt\s)(?<!be\s)(?:no longer )?less (?:likely|probable|probably)",
    r"less (?:likely|probable) (?:to|due|related|that)",
    r"query",
    rf"to (?:\w+ ){{0,3}}{_EXCLUDE}",
    r"(?:to|can|could|would|and) (?:\w+ ){0,2}(?:ensure|confirm|document|verify|establish) (?:\w+ ){0,3}"
    r"(?:absence|lack|presence) of",
    r"(?:hard|difficult|impossible|unable) to (?:tell|distinguish|differentiate|separate)",
    r"(?:indistinguishable|cannot be (?:distinguished|differentiated|separated)) from",
    r"either",
    r"whether",
    r"(?:versus|vs\.?)",
    r"favou?r(?:s|ed|ing)? (?:\w+ ){1,5}over",
    r"may(?:be)?",
    r"might",
    r"could",
    r"possib(?:le|ly|ility of)",
    r"potential(?:ly)?",
    r"suspicion (?:of|for)",
    r"concern (?:for|of)",
    r"question(?:able|ed)?(?: of)?",
    r"equivocal",
    rf"(?:cannot|can not|can't|could not|couldn't) (?:\w+ )?{_EXCLUDE}",
    rf"(?:not|n't|hard to|difficult to|impossible to|unable to|not possible to) (?:\w+ )?{_EXCLUDE}",
    r"if (?:there is|clinical)",
    r"differential",
    r"(?:evaluate|eval|assess|assessment|evaluation|look|check|r/o|rule out|please) (?:for|of)?",
    r"(?:raise|raises|raising) (?:\w+ ){0,3}(?:possibility|concern|question)",
    r"(?:can|should) be considered",
)
UNCERTAIN_AFTER = (
    rf"(?:cannot|can not|can't|could not|couldn't|not) (?:\w+ ){{0,3}}{_EXCLUDE}",
    r"(?:is|are) (?:\w+ )?(?:possible|not excluded|questionable|questioned|uncertain|equivocal)",
    rf"(?:hard|difficult|impossible|not possible) to (?:\w+ ){{0,2}}{_EXCLUDE}",
    r"(?:should|could|may|might|must) (?:also )?be (?:\w+ )?(?:considered|present|suspected|entertained)",
    r"(?:versus|vs)",
    r"(?:is|are|remains?) (?:a|in the) (?:\w+ )?(?:consideration|differential|possibility|concern)",
)
DOUBTED = r"\b(?:may|might|could|possibl[ey]|questionabl[ey])\b"
"""Inside a mention: "the heart may be enlarged"."""
LESS_LIKELY_AFTER = (r"less (?:\w+ )?(?:likely|probable|favou?red)", r"not (?:as |so )likely")
EARLIER = (
    r"\s*(?:previously|before|earlier|yesterday"
    r"|(?:on|in|at) (?:the )?(?:prior|previous|earlier|last|preceding|old|comparison)|last \w+)\b"
)
"""Directly behind "was not seen": the finding was not there before, and is now."""
UNLIKELY_AFTER = (
    r"unlikely",
    r"not (?:\w+ )?(?:likely|favou?red|suspected|probable|expected)",
    r"not (?:thought|felt) to be present",
    r"(?:improbable|implausible|doubtful|doubted)",
)
"""Read behind a mention and before the next comma."""
LIKELIHOOD_BEFORE = (
    r"(?:likelihood|probability|possibility|suspicion|chance|risk) (?:of|for) (?:\w+ ){0,3}",
)
LOW_AFTER = (r"(?:is|are|remains?|seems?|appears?) (?:\w+ )?(?:low|remote|small|slim|minimal)",)
"""A mention between the two is unlikely: "the likelihood of edema is low"."""
PART_BEFORE = (r"(?:most|much|majority|bulk|some|part|portion|component|half) of (?:\w+ ){0,4}",)
"""In front of a mention that "has cleared": a part of it has not."""
RESIDUE_AFTER = (
    r"now (?:only )?(?:mild|minimal|small|trace|faint|tiny)",
    r"with (?:\w+ ){0,2}residu(?:al|um|a)(?=\s*(?:[.,;]|$|component|disease|change))",
)
"""Behind "resolution of" a mention: some of it is left."""

REMOVED_BEFORE = (
    r"(?:removal|withdrawal|explantation|discontinuation|extraction) of",
    r"(?:removed|explanted|discontinued)(?: (?:the|a|an|his|her|left|right|prior|previous))*(?=\s*$)",
)
REMOVED_AFTER = (
    r"(?:has|have|had|was|were|is|are|been) (?:\w+ ){0,2}(?:removed|taken out|explanted|discontinued|out)",
    r"(?:has|have|had|was|were|been) (?:\w+ ){0,2}(?:withdrawn|pulled)"
    r"(?! (?:back|by|to|up|slightly|\d|(?!complete|entire)\w+ly))",
    r"(?:removed|removal|explanted|discontinued|pulled(?! back)|out(?= since| of place|\s*(?:[.,;]|$)))",
)
"""Cues that a device is no longer in place."""
PLACED = r"\b(?:placement|insertion|replac\w+|exchang\w+|placed|inserted)\b"

_ANSWER = r"\s*(?::|=|\?+|\(|\t|\||\s[-\u2013\u2014](?=\s))\s*"
"""Separators between the name of a finding and its value in a list."""
_NO = (
    r"(?:none|no(?: evidence)?(?=\s*(?:[.,;)\n]|$))|absent|negative|neg|nil"
    r"|not (?:present|seen|identified|visuali[sz]ed|evident)|resolved|cleared|excluded|ruled out|removed|gone)\b"
)
_JOINED = r"(?:\s*(?:/|\band\b|\bor\b)\s*[\w-]+(?: [\w-]+){0,3}){0,2}"
"""More findings in front of a value that they share: "edema/effusion: none"."""
VALUE_ABSENT = rf"(?:{_JOINED}{_ANSWER}{_NO}|[,;.]\s+(?:and |but )?none (?:is |are |was |were )?{SHOWN}\b)"
VALUE_PRESENT = rf"{_JOINED}{_ANSWER}(?:yes|present|positive|pos)\b"
VALUE_UNCERTAIN = (
    rf"{_JOINED}{_ANSWER}(?:possibl[ey]|questionable|equivocal|\?|uncertain|maybe|indeterminate"
    r"|cannot (?:be )?exclude\w*)"
)
"""What a list writes behind the name of a finding."""

NO_STATEMENT_BEFORE = (
    r"history",
    r"(?:man|woman|male|female|patient|pt|m|f) with",
    r"(?:patient|pt|he|she) (?:previously )?had",
    r"(?:treated|treatment|hospitali[sz]ed|admitted) for",
    r"(?:status post|s/p) (?:treatment|therapy) (?:of|for)",
    r"(?:performed|obtained|ordered|requested|done|acquired|indicated) (?:\w+ ){0,2}"
    r"(?:for|to|because of|given|due to)(?: \w+){0,4}?(?: (?:suspicion|concern|question|evaluation|assessment))?"
    r"(?: (?:of|for))?",
)
"""What was known or asked before the image was read."""
NO_STATEMENT_AFTER = (
    r"(?:is|are|may be|can be|could be|would be|might be|should be) (?:\w+ )?"
    r"(?:missed|overlooked|undetected|underestimated|occult|obscured)",
    r"(?:would|could|may|might) be (?:better|best|more) (?:\w+ )?"
    r"(?:seen|evaluated|assessed|shown|depicted|appreciated) (?:with|on|by|using|in)",
    r"(?:go|goes|remain|be) (?:undetected|unnoticed|unrecogni[sz]ed)",
    r"(?:in the past|years? ago|last year)",
    r"(?:cannot|can not|could not|can't|couldn't) be (?:\w+ )?(?:evaluated|assessed|judged|determined|commented)",
)
SEEN_ELSEWHERE = (
    r"\s+(?:seen )?on (?:the |an )?(?:prior|previous|outside) (?:ct|study|imaging|mri|exam)\s*(?:[.;]|$)"
)
"""Directly behind a mention: it was seen on another image."""
MISSED_BEFORE = (
    r"(?:needed|required|necessary|recommended|helpful|useful|advised|suggested|preferred|superior)(?: \w+){0,3}"
    r" (?:detect\w*|diagnos\w+|identif\w+|recogni\w+|exclusion)(?: [\w-]+){0,4}\s*$",
    r"(?:(?:may|might|can|could|will|often|commonly|radiographs?|films?|views?)"
    r" (?:be )?(?:miss|overlook)(?:ed)?|misses)(?: [\w-]+){0,7}\s*$",
    r"(?:better|best|more|well|less|in|not|poorly) ?(?:suited|sensitive|able)(?: [\w-]+){0,6}\s*$",
)
"""Clauses about what images can show."""
LIMITED = (
    r"(?:limit\w*|reduc\w*|decreas\w*|insensitive|not sensitive|low|poor|difficult\w*|suboptimal\w*|preclud\w*"
    r"|hinder\w*|compromis\w*|lower\w*|diminish\w*|impair\w*|hamper\w*|restrict\w*|obscur\w*|degrad\w*|confound\w*"
    r"|challenging|not (?:sensitive|adequate|reliable|possible)|inadequate|insufficient|unreliable|impossible"
    r"|prevent\w*|less sensitive)"
)
TASK = (
    r"(?:sensitiv\w*|insensitive|detect\w*|evaluat\w*|assess\w*|exclu(?:sion|ding)|ability|diagnosis|diagnosing|identification|identifying"
    r"|visuali[sz]ation|interpretation|characteri[sz]ation|recognition|depiction|adequate|reliable)"
)
"""A clause with both, the task before the mention, describes the technique and states nothing about the finding."""
RESULT = (
    r"(?:shows?|show(?:ed|ing)|demonstrat\w+|reveal\w*|is|are|was|were|there|with|and|but|has|have|suggest\w*"
    r"|presence|due|because|given|by|since|after)"
)
"""Words behind which a clause about the technique is over."""

TERMINATION = (
    r"but",
    r"however",
    r"although",
    r"though",
    r"aside from",
    r"apart from",
    r"except(?: for)?",
    r"other than",
    r"(?:with the exception of|save for|besides)",
    r"which",
    r"while",
    r"whereas",
    r"due to",
    r"secondary to",
    r"and there (?:is|are)",
    r"(?<!no\s)there (?:is|are|has|remains|'s)",
    r"with (?!no\b)(?:\w+ )?(?:small|moderate|large|mild|stable|unchanged|persistent|associated)",
)
EXPLAINS = (
    r"\b(?:reflect\w*|represent\w*|suggest\w*|consistent|compatible|concerning|suspicious|worrisome|likely|probably|due"
    r"|secondary|related|could be|may be|might be)\b"
)
"""Between a finding and its explanation: a doubt about the explanation is none about the finding."""
CAUSES = r"\b(?:due to|represent\w*|reflect\w*|caused by|secondary to|related to)\s+(?:[\w-]+\s+){0,5}$"
"""In front of "A or B", one of which is the cause."""
SIZE_WORDS = (
    r"(?:small|moderate|large|mild|severe|stable|unchanged|persistent|bilateral|minimal|tiny|trace|increas\w+|worsening"
    r"|there|the|left|right|bibasilar|low|mildly|moderately|improving|decreas\w+|known|chronic|old|healed|residual"
    r"|slight|extensive|subtle|again|possible|probable|likely)"
)
_CLINICAL = r"clinical (?:history|information|indication|question|details?|data|background|concern|statement)"
SILENT_SECTIONS = (
    rf"indications?|history|{_CLINICAL}|reasons? for (?:the )?(?:exam\w*|study|visit|order|request|consult\w*|test)"
    r"|(?:exam )?reason|technique|comparisons?|exam(?:ination)?|study|procedure|type of examination|chief complaint"
    r"|clinical|(?:signs? and )?symptoms?|hx|pmh|past medical history|presenting complaint|background|question"
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
    geen niet rechts links beidseits herz lunge lungen nachweis hinweis pulmones derrame coeur poumon poumons polmoni
    cuore versamento brak bez ingen inget yok
    """.split()  # noqa: SIM905 - one word per item would take a hundred lines
)

"""Cues of the rule labeller: the words around a phrase that affirm, doubt or deny it.

The cues are regular expressions over lower-case text, as in `phrases`. In a cue, " not" also matches "n't", "can not"
also matches "cannot" and "can't", and "NOT" at the start of a cue matches "not" and every contraction. Most lists come
in pairs: a cue in a list named BEFORE precedes the mention, a cue in a list named AFTER follows it. `labels` decides
how far a cue reaches and which cue takes precedence.
"""

NORMAL_PHRASES = (
    r"(?:within )?normal limits",
    r"(?:is|are|appears?|remains?) (?:\w+ )?(?:normal|clear|unremarkable)",
    r"no (?:acute|active|significant|focal)",
    r"(?:lungs?|heart|chest|pleura\w*|mediastinum|airways?)"
    r"(?:(?:,? and |, | / |/)(?:the )?(?:lungs?|heart|pleura\w*|mediastinum|airways?|chest)){0,3}"
    r" (?:\w+ ){0,3}(?:clear|normal|unremarkable|well (?:expanded|inflated|aerated))",
    r"intact",
    r"(?:clear|normal) (?:lungs?|chest|heart)",
    r"no (?:acute )?(?:\w+ ){0,2}(?:process|abnormalit\w+|disease)",
    r"(?:normal|unremarkable) (?:portable )?(?:chest|radiograph|study|exam|examination|lungs?)",
)
"""A text that states one of these and no observation is normal; a text without either is unknown."""

_ANATOMY = (
    r"(?:heart|cardiac|cardiomediastinal|mediastin\w+|lungs?|pulmonary|vascul\w+|vessels?|hil(?:a|ar|um)"
    r"|costophrenic|pleural"
    r"|(?:hemi)?diaphragm\w*|osseous|bon(?:es?|y)|ribs?|spine|trachea\w*|aort\w+|parenchyma\w*|interstiti\w+"
    r"|silhouettes?"
    r"|sulcus|sulci|angles?|patient)"
)
OTHER_STATEMENTS = (
    rf"{_ANATOMY} (?:[\w-]+ ){{0,6}}?(?:is|are|was|were|has|have|remains?|appears?|seems?|stable|unchanged"
    rf"|demonstrate\w*|show\w*)",
    r"(?:tips?|side ?ports?|position) (?:\w+ )?(?:is|are|projects?|ends?|terminates?|overl\w+|remains?)",
    r"(?:extubat\w+|intubated|low lung volumes|hyperinflat\w+|hyperexpan\w+|emphysema\w*|bronchiectasis|scoliosis"
    r"|kyphosis"
    r"|congestion|engorgement|blunting|scarring|degenerative|tortuous|hernia|pneumomediastinum|pneumoperitoneum"
    r"|free air"
    r"|adenopathy|lymphadenopathy|calcifi\w+|osteopenia|atheroscler\w+)",
)
"""A text that states one of these is readable, even if it mentions none of the 14 observations."""

_DEGREE = (
    r"(?:interval|significant(?:ly)?|appreciabl[ey]|relevant(?:ly)?|substantial(?:ly)?|definite(?:ly)?|major"
    r"|gross(?:ly)?"
    r"|great(?:ly)?|much|marked(?:ly)?|acute(?:ly)?|further|real(?:ly)?|yet|been|any|large(?:ly)?|notable|important)"
)
_GONE = r"(?:resol(?:ution|v\w+)|clear(?:ing|ance|ed)|disappear\w*|vanish\w*)"
_PARTLY = (
    r"(?:near(?:ly)?|almost|virtual(?:ly)?|incomplete(?:ly)?|partial(?:ly)?|part(?:ly)?|mostly|largely"
    r"|substantial(?:ly)?"
    r"|significant(?:ly)?|some|slight(?:ly)?|mild|continu\w+|ongoing|further|progressive(?:ly)?|gradual(?:ly)?"
    r"|slow(?:ly)?"
    r"|early|moderate|interval partial|not(?: yet| been| fully| completely| entirely| totally)*)"
)
SHOWN = (
    r"(?:seen|identified|present|visuali[sz]ed|visible|detected|detectable|apparent|evident|demonstrated"
    r"|appreciated|noted"
    r"|recogni[sz]ed|found|observed|shown|discerned|depicted|imaged|perceived|confirmed|re-?demonstrated|reproduced)"
)
PSEUDO_NEGATION = (
    rf"(?:no|without(?: any)?) (?:\w+ )?(?:{_DEGREE} )*changes?",
    rf"NOT (?:{_DEGREE} )*(?:changed|different)",
    rf"no (?:{_DEGREE} )?(?:increase|decrease|improvement|progression|difference|worsening)",
    rf"(?:do|does|did|has|have) not (?:{_DEGREE} )*(?:chang\w+|increas\w+|decreas\w+|improv\w+|progress\w*"
    rf"|worsen\w*|enlarged?)",
    r"without (?:\w+ ){0,2}changes?",
    rf"without (?:yet )?(?:complete|full|total|entire) {_GONE}",
    r"not only",
    r"(?:no|without|beyond|little) doubt",
    r"not necessarily",
    r"no longer (?:enlarging|increasing|growing)",
    rf"{_PARTLY} (?:(?:but|and|though) \w+ )?(?:interval )?(?:complete(?:ly)? |total(?:ly)? |entire(?:ly)? )?{_GONE}",
    rf"NOT (?:yet |been |fully |completely |entirely |totally )*{_GONE}",
    r"(?:fail\w*|yet|continu\w+|beginning|starting|expected|slow) to (?:\w+ )?(?:resolve|clear)",
    rf"{_GONE} (?:almost|nearly|partially|partly|incompletely|in part|for the most part|slowly|gradually"
    rf"|as expected)",
    r"(?:is|are|be) (?:\w+ )?(?:resolving|clearing)",
    r"(?:until|ensure|document|confirm|assure|demonstrate|follow|monitor|to|after"
    r"|pending) (?:\w+ ){0,2}(?:resolution|clearing)",
    r"(?:almost|nearly|mostly|largely) (?:\w+ )?gone",
    r"NOT (?:yet |been )*(?:removed|withdrawn|taken out|pulled)",
    r"(?:could|can|should|may|might|to|consider|recommend\w*|suggest\w*|advise\w*|before|prior to|pending|for)"
    r" (?:be |the |its )*(?:remov(?:ed|al)|withdrawn|withdrawal|pulled|discontinued)",
    r"NOT (?:be )?(?:well|fully|completely|entirely|optimally|adequately) (?:seen|visuali[sz]ed|evaluated|assessed"
    r"|included|imaged)",
    r"NOT (?:as|so) (?!likely|probable)\w+(?: seen)?",
    r"NOT (?:\w+ )?(?:clear|normal|expanded|inflated|hyperinflated|aerated|included|imaged|rotated|upright"
    r"|available)",
    r"(?:no|not? (?:\w+ ){0,3}available|without)(?: \w+)? (?:prior|previous"
    r"|comparison)s?(?: \w+){0,2}(?: available)?",
    rf"(?:not|no) (?:\w+ )?(?:previously|before|earlier) {SHOWN}",
    rf"NOT (?:\w+ )?{SHOWN} (?:previously|before|earlier|yesterday|last \w+"
    r"|(?:on|in|at) (?:the |any )?(?:prior|previous|earlier|last|preceding|old|comparison))",
)
"""Phrases that look like negations but do not deny what follows."""

_RESEMBLE = (
    r"(?:suspicious|concerning|suggestive|typical|characteristic|consistent|compatible|worrisome|diagnostic"
    r"|indicative"
    r"|convincing|representative)"
)
NEGATION_BEFORE = (
    r"no (?:\w+ )?(?:evidence|signs?|suggestion|indication)(?: of)?",
    r"no",
    r"not?(?: \w+){0,2} (?:evidence|signs?|suggestion|indication) of",
    r"without",
    r"w/o",
    r"(?:free|clear|devoid) (?:of|from)",
    r"(?:absence|lack|disappearance) of",
    r"absent(?=:)",
    r"negative(?: for|(?=:))",
    r"neither",
    r"nor",
    r"never",
    r"nothing (?:\w+ ){0,2}(?:to|suggest\w*|that)",
    r"(?:resolved(?! (?:since|after|following|in|by|with|on|from|over|and|but|now|completely|entirely)\b)"
    r"|resolution of"
    r"|clear(?:ing|ance) of)",
    r"(?:do|does|did|can not|could|would|wo|ca) not (?:\w+ )?(?:\w+)",
    r"(?:is|are|was|were|has|have|had) not",
    r"fail(?:s|ed)? to \w+",
    r"unable to (?:\w+ )?(?:see|identify|find|detect|appreciate|demonstrate|recogni[sz]e)",
    r"(?:it's|it is|this is|these are) not",
    r"(?:nowhere|not (?:an?|due|from|related))",
    r"NOT (?:see|seen|identify|demonstrate|show|have|appear|reveal|detect|any)",
    r"NOT (?:\w+ )?(?:likely|expected|thought|felt|favou?red|suspected|believed) to(?: \w+)?(?: an?)?",
    r"unlikely (?:to be (?:due|secondary|related) to|to|due|related|that|for|given)",
    r"(?:(?<=and\s)|(?<=but\s)|(?<![a-z]\s))unlikely",
    r"unlikely (?:an?|any|true|real)",
    r"an? unlikely",
    r"(?:rather|(?:more|much more|most) (?:\w+ )?(?:likely|probabl[ey]|typical|suggestive|consistent|compatible"
    r"|in keeping)"
    r"(?: [\w-]+){0,6}?|likelier(?: [\w-]+){0,4}?) than",
    r"(?:instead of|as opposed to)",
    rf"NOT (?:\w+ )?{_RESEMBLE} (?:for|of|with)",
    r"(?:excludes|excluded|rules out|ruled out)",
    r"(?:argu\w+|speak\w*|weigh\w*|mitigat\w+|evidence) against",
    r"doubt(?:ful)?(?: for| of)?",
    r"(?:improbable|implausible)(?: that| for| to)?",
    r"low (?:clinical |index of )?(?:likelihood|probability|suspicion|concern|chance) (?:of|for)",
)
_ENDS = r"(?=\s*(?:[.,;)]|$)| (?:since|after|following|in|on|from|with|over|and|completely|entirely|by|now|today)\b)"
NEGATION_AFTER = (
    rf"nowhere (?:to be )?{SHOWN}",
    rf"(?:NOT|no longer) (?:\w+ ){{0,2}}{SHOWN}",
    rf"(?:could|can) not be (?:\w+ )?{SHOWN}",
    r"(?:is|are) not(?=\s*(?:[.,;]|$))",
    rf"no longer (?:\w+ )?(?:{SHOWN}|in place|there)",
    r"(?:has|have|had|having|to have|appears?|seems?|now|since|is|are|was|were) (?:\w+ ){0,2}"
    r"(?:resolved|cleared|disappeared|gone|vanished|evacuated)",
    r"(?:has|have|had|did) not (?:\w+ )?(?:developed?|recur\w*|appear\w*|occur\w*|formed?|re-?accumulated?|returned)",
    r"(?:is|are|was|were|has been|have been) (?:\w+ )?(?:absent|excluded|ruled out)",
    rf"(?:resolved|cleared){_ENDS}",
)
# Labelled present, since they state a probability above one half: "likely", "probably", "suggesting", "suspicious for",
# "concerning for", "worrisome for", "suspected". Labelled uncertain: a finding named as one possibility, or not
# excluded.
_EXCLUDE = r"(?:exclude[ds]?|excluding|rule[ds]? out|ruling out)"
SUBJECT_OF_DOUBT = r"\bdifferential(?: \w+)? (?:for|of) (?:[\w-]+ ){0,4}$"
"""Before a finding whose causes are listed: "the differential for the opacity includes"."""
UNCERTAIN_BEFORE = (
    r"(?<!is\s)(?<!are\s)(?<!felt\s)(?<!be\s)(?:no longer )?less (?:likely|probable|probably)",
    r"less (?:likely|probable) (?:to|due|related|that)",
    r"query",
    r"(?:exclude|rule out|excluding|ruling out)",
    rf"(?:not|n't) (?:\w+ ){{0,2}}{_EXCLUDE}",
    r"(?:to|can|could|would|and) (?:\w+ ){0,2}(?:ensure|confirm|document|verify|establish) (?:\w+ ){0,3}"
    r"(?:absence|lack|presence) of",
    r"(?:hard|difficult|impossible|unable) to (?:tell|distinguish|differentiate|separate)",
    r"(?:indistinguishable|can not be (?:\w+ )?(?:distinguished|differentiated|separated)) from",
    r"either",
    r"whether",
    r"(?:versus|vs\.?)",
    r"favou?r(?:s|ed|ing)?(?: [\w-]+){0,5} over",
    r"may(?:be)?",
    r"might",
    r"could",
    r"possib(?:le|ly|ility of)",
    r"potential(?:ly)?",
    r"perhaps",
    r"suspicion (?:of|for)",
    r"concern (?:for|of)",
    r"question(?:able|ed|s)?(?: of)?",
    r"equivocal",
    r"if (?:there is|clinical)",
    r"(?:differential|ddx|(?:diagnostic|other|alternative|primary|main) considerations?)(?: (?:diagnos[ie]s"
    r"|considerations?|includes?|would|are|is|for|this|these))*",
    r"(?:evaluate|eval|assess|assessment|evaluation|look|check) (?:for|of)",
    r"(?<!to\s)(?:evaluate|eval|assess|check|please|r/o)",
    r"(?:raise|raises|raising) (?:\w+ ){0,3}(?:possibility|concern|question|suspicion)",
    r"(?:can|should) be considered",
)
VERSUS_AFTER = (r"(?:versus|vs)",)
"""Applies to the mentions before it, but not beyond "with": "effusion with atelectasis versus pneumonia"."""
UNCERTAIN_AFTER = (
    rf"(?:can not|could not) (?:\w+ ){{0,3}}{_EXCLUDE}",
    rf"NOT (?:\w+ ){{0,3}}{_EXCLUDE}",
    rf"(?:should|must|needs? to|has to|have to|to|would need to|may|might) be (?:\w+ )?{_EXCLUDE}",
    r"(?:is|are|remains?) (?:\w+ )?(?:possible|questionable|questioned|uncertain|equivocal|indeterminate|unclear)",
    rf"(?:hard|difficult|impossible|not possible) to (?:\w+ ){{0,2}}{_EXCLUDE}",
    r"(?:should|could|may|might|must|can) (?:also |still )?be (?:\w+ )?(?:considered|present|suspected|entertained)",
    r"(?:is|are|remains?) (?:also )?(?:a|in the|within the|another) (?:\w+ )?(?:consideration|differential"
    r"|possibility|concern)",
    r"(?:in|given) the (?:appropriate|proper|right|correct) (?:clinical )?(?:setting|context|scenario)",
    r"if clinically suspected",
)
DOUBTED = r"\b(?:may|might|could|possibl[ey]|questionabl[ey]|query)\b"
"""Inside a mention: "the heart may be enlarged"."""
LESS_LIKELY_AFTER = (r"less (?:\w+ )?(?:likely|probable|favou?red)", r"not (?:as |so )likely")
EXPLAINED_AWAY = (
    r"[^,;]{0,40}\b(?:nipple shadows?|artifact\w*|artefact\w*|skin folds?|summation|(?:vessels?"
    r"|vascular) (?:seen )?(?:on end|end-on)"
    r"|due to (?:\w+ ){0,2}(?:position(?:ing)?|technique|projection|rotation|magnification))\b"
)
"""Directly after a mention: what looks like the finding is probably something else."""
UNLIKELY_AFTER = (
    r"unlikely(?! (?:to|due|related|that)\b(?! be present))",
    r"not (?:\w+ )?(?:likely|favou?red|suspected|probable|expected)(?! to\b)",
    r"not (?:thought|felt) to be present",
    r"(?:improbable|implausible|doubtful|doubted)",
)
"""Applies between a mention and the next comma."""
LIKELIHOOD_BEFORE = (
    r"(?:likelihood|probability|possibility|suspicion|chance|risk) (?:of|for) (?:\w+ ){0,3}",
)
LOW_AFTER = (r"(?:is|are|remains?|seems?|appears?) (?:\w+ )?(?:low|remote|small|slim|minimal)",)
"""A mention between the two is unlikely: "the likelihood of edema is low"."""
PART_BEFORE = (
    r"(?:most|much|majority|bulk|some|part|portion|component|half|one|two|several) of (?:\w+ ){0,4}",
)
"""Before a mention that "has cleared" or "was removed": a part of the finding remains."""
EXTENT_BEFORE = (
    r"(?:extent|severity|size|volume|acuity|age|chronicity|etiology|cause|contributions?|position|location|tips?"
    r"|course|side port) of (?:[\w-]+ ){0,4}",
)
"""Before a mention whose extent is unclear or cannot be assessed: the finding itself is present."""
TIP_AFTER = r"\s+(?:tips?|side ?port|side ?hole|course|position)\b"
"""Directly after a device: what follows is about a part of the device."""
RESIDUE_AFTER = (
    r"now (?:only )?(?:mild|minimal|small|trace|faint|tiny)",
    r"with (?:\w+ ){0,2}residu(?:al|um|a)(?=\s*(?:[.,;]|$|component|disease|change))",
)
"""After "resolution of" a mention: some of the finding remains."""

REMOVED_BEFORE = (
    r"(?:removal|withdrawal|explantation|discontinuation|extraction) of",
    r"(?:removed|explanted|discontinued)(?: (?:the|a|an|his|her|left|right|prior|previous))*(?=\s*$)",
)
REMOVED_AFTER = (
    r"(?:has|have|had|was|were|is|are|been) (?:\w+ ){0,2}(?:removed|taken out|explanted|discontinued|out"
    r"|decannulated)",
    r"(?:has|have|had|was|were|been) (?:\w+ ){0,2}(?:withdrawn|pulled)"
    r"(?! (?:back|by|to|up|slightly|\d|(?!complete|entire)\w+ly))",
    r"(?:removed|removal|explanted|discontinued|decannulat\w+|pulled(?! back)|out(?= since| of place|\s*(?:[.,;]"
    r"|$)))",
)
"""Cues that a device is no longer in place."""
PLACED = r"\b(?:placement|insertion|replac\w+|exchang\w+|placed|inserted)\b"

_ANSWER = r"\s*(?::|=|\?+|\(|\t|\||\s[-\u2013\u2014](?=\s))\s*"
"""Separators between the name of a finding and its value in a list."""
_NO = (
    r"(?:none|no(?: evidence)?(?=\s*(?:[.,;)\n]|$))|absent|negative|neg|nil|n/a"
    r"|not (?:present|seen|identified|visuali[sz]ed|evident|applicable)|no longer|unlikely|resolved|cleared|excluded"
    r"|ruled out|removed|gone)(?!\w)"
)
_MAYBE = r"(?:possibl[ey]|questionable|equivocal|\?|uncertain|maybe|indeterminate|suspected|cannot (?:be )?exclude\w*)"
_JOINED = r"(?:\s*(?:/|\band\b|\bor\b)\s*[\w-]+(?: [\w-]+){0,3}){0,2}"
"""Further findings before a value that they share: "edema/effusion: none"."""
VALUE_ABSENT = (
    rf"(?:{_JOINED}{_ANSWER}(?:previously {SHOWN},? (?:but )?(?:now )?)?{_NO}"
    rf"|[,;.]\s+(?:and |but )?none (?:is |are |was |were )?{SHOWN}\b)"
)
VALUE_PRESENT = (
    rf"{_JOINED}{_ANSWER}(?:(?:yes|present|positive|pos)\b"
    r"|(?:none|no|absent)\b[^.;,:]*?\b(?:left|right)\b[^.;,:]*,?[^.;,:]*?\b(?:small|mild|moderate|large|trace"
    r"|minimal|present|tiny)\b)"
)
VALUE_UNCERTAIN = rf"{_JOINED}{_ANSWER}{_MAYBE}"
LABEL = rf"{_JOINED}\s*:\s*"
"""After a mention that is only a heading: "Effusion: no large effusion"."""
VALUE = rf"(?:{VALUE_ABSENT}|{VALUE_PRESENT}|{VALUE_UNCERTAIN})"
"""Values that follow the name of a finding in a list."""

_MODAL = r"(?:may|might|can|could|would|will|should)"
_PERCEIVE = (
    r"(?:see|detect|identify|assess|evaluate|appreciate|visuali[sz]e|diagnose|recogni[sz]e|judge|determine|comment on"
    r"|interpret|characteri[sz]e|quantify|gauge|measure)"
)
NO_STATEMENT_BEFORE = (
    r"(?:history|hx|h/o|pmh)(?: (?:of|is|significant|notable|includes|for))*",
    r"(?:man|woman|male|female|patient|pt|m|f|child|infant|boy|girl|gentleman|lady) with",
    r"\d+\s?(?:yo|y/o|yrs?|years? old)?\s?(?:m|f|male|female|man|woman)? with",
    r"(?:patient|pt|he|she) (?:previously )?(?:had|has (?:a )?history)",
    r"(?:present(?:s|ed|ing)|admitted|diagnosed|hospitali[sz]ed|readmitted|transferred) (?:\w+ ){0,2}(?:with|for)",
    r"(?:known to have|suffer\w* from|recently treated|recovering from|recent (?:diagnosis|admission"
    r"|hospitali[sz]ation) (?:of|for))",
    r"(?:treated|treatment|therapy|antibiotics?|diuresis) for",
    r"(?:status post|s/p) (?:\w+ )?(?:treatment|therapy|resection|repair) (?:of|for)",
    r"(?:performed|obtained|ordered|requested|done|acquired|indicated) (?:\w+ ){0,2}"
    r"(?:for|to|because of|given|due to)(?: \w+){0,4}?(?: (?:suspicion|concern|question|evaluation|assessment))?"
    r"(?: (?:of|for))?",
)
"""History and clinical questions: what was known or asked before the image was read."""
NO_STATEMENT_AFTER = (
    r"(?:is|are|may be|can be|could be|would be|might be|should be) (?:\w+ )?"
    r"(?:missed|overlooked|undetected|underestimated|occult|obscured|masked|hidden|concealed|inapparent|invisible)",
    rf"{_MODAL} (?:\w+ )?be (?:better|best|more) (?:\w+ )?"
    r"(?:seen|evaluated|assessed|shown|depicted|appreciated|characteri[sz]ed|visuali[sz]ed)(?: (?:with|on|by|using"
    r"|in))?",
    rf"(?:would|may|might|will) (?:easily )?not (?:\w+ )?(?:be )?{SHOWN}",
    rf"(?:may|might|can|could|would|is|are) (?:\w+ )?(?:be )?(?:\w+ )?(?:hard|difficult|impossible"
    rf"|challenging) to {_PERCEIVE}",
    r"(?:go|goes|remain|be|escape) (?:undetected|unnoticed|unrecogni[sz]ed|detection)",
    r"(?:in the past|years? ago|last year)",
    r"(?:can not|could not) be (?:\w+ ){0,2}(?:evaluated|assessed|judged|determined|commented|diagnosed)",
    r"(?:is|are) (?:\w+ )?(?:limited|suboptimal|precluded)",
    r"(?:is|are) not (?:\w+ )?(?:evaluated|assessed|evaluable|assessable)",
)
SEEN_ELSEWHERE = (
    r"\s+(?:(?:seen )?on (?:the |an )?(?:prior|previous|outside) (?:ct|study|imaging|mri|exam)\s*(?:[.;]|$)"
    r"|(?:treatment|therapy|protocol|precautions|work-?up|prophylaxis)\b)"
)
"""Directly after a mention: the finding was seen on another image, or the words name a treatment."""
MISSED_BEFORE = (
    r"(?:needed|required|necessary|recommended|helpful|useful|advised|suggested|preferred|superior)(?: \w+){0,3}"
    r" (?:detect\w*|diagnos\w+|identif\w+|recogni\w+|exclusion)(?: [\w-]+){0,4}\s*$",
    r"(?:(?:may|might|can|could|will|often|commonly|radiographs?|films?|views?)"
    r" (?:be )?(?:miss|overlook|obscure|mask|hide|conceal|underestimate)(?:ed)?"
    r"|misses|masks?|(?:exaggerat\w+|accentuat\w+|magnif\w+))(?: [\w-]+){0,7}\s*$",
    r"(?:better|best|more|well|less|in|not|poorly) ?(?:suited|sensitive|able|optimi[sz]ed|tailored"
    r"|designed)(?: [\w-]+){0,6}\s*$",
)
"""Clauses about what images can show."""
LIMITED = (
    r"(?:limit\w*|reduc\w*|decreas\w*|insensitive|not sensitive|low|poor|difficult\w*|suboptimal\w*|preclud\w*"
    r"|hinder\w*|compromis\w*|lower\w*|diminish\w*|impair\w*|hamper\w*|restrict\w*|obscur\w*|degrad\w*|confound\w*"
    r"|challenging|not (?:sensitive|adequate|reliable|possible|optimi[sz]ed|tailored|designed|intended|dedicated"
    r"|performed)"
    r"|inadequate|insufficient|unreliable|impossible|incomplete(?:ly)?|complicat\w*|affect\w*|mak\w+ it|interfer\w*"
    r"|prevent\w*|less sensitive|(?:more|better|most) (?:\w+ )?(?:sensitive|suited|accurate|reliable)"
    r"|would be better)"
)
TASK = (
    r"(?:sensitiv\w*|insensitive|detect\w*|evaluat\w*|assess\w*|exclu(?:sion|ding)|ability|diagnosis|diagnosing"
    r"|diagnose|identification|identifying|identify|visuali[sz]ation|interpretation|characteri[sz]ation|recognition"
    r"|depiction|adequate|reliable|discerning|appreciat\w+|estimation|accuracy)"
)
"""A clause with both, and the task before the mention, describes the technique and not the finding."""
RESULT = (
    r"(?:shows?|show(?:ed|ing)|demonstrat\w+|reveal\w*|is|are|was|were|there|with|and|but|has|have|suggest\w*"
    r"|presence|due|because|given|by|since|after)"
)
"""Words that end a clause about the technique."""

TERMINATION = (
    r"but",
    r"however",
    r"although",
    r"though",
    r"yet(?! to\b)",
    r"aside from",
    r"apart from",
    r"except(?: for)?",
    r"other than",
    r"(?:with the exception of|save for|besides)",
    r"which",
    r"while",
    r"whereas",
    r"(?<!likely\sto\sbe\s)(?:due|secondary) to",
    r"and (?:there|it) (?:is|are)",
    r"(?<!no\s)there (?:is|are|has|remains|'s)",
    r"with (?!no\b)(?:\w+ )?(?:small|moderate|large|mild|stable|unchanged|persistent|associated|residual|new)",
)
APPOSITION = (
    r",\s+(?:while|although|though|if|as|seen|noted|described|present|identified|reported|visuali[sz]ed"
    r"|demonstrated|known"
    r"|new|previously|prior|which)\b[^,.;]{1,50},(?=\s+(?:is|are|was|were|has|have|had|remains?|appears?|cannot|can"
    r"|could|may|might|seems?)\b)"
)
"""Words between commas that separate a mention from its verb: "effusion, seen previously, has resolved"."""
EXPLAINS = (
    r"\b(?:reflect\w*|represent\w*|suggest\w*|consistent|compatible|concerning|suspicious|worrisome|likely"
    r"|probably|due"
    r"|secondary|related|could be|may be|might be|include[sd]?|including)\b"
)
"""Between a finding and its explanation: doubt about the explanation is not doubt about the finding."""
CAUSES = r"\b(?:due to|represent\w*|reflect\w*|caused by|secondary to|related to)\s+(?:[\w-]+\s+){0,5}$"
"""Before "A or B", where one of the two is the cause."""
SIZE_WORDS = (
    r"(?:small|moderate|large|mild|severe|stable|unchanged|persistent|bilateral|minimal|tiny|trace|increas\w+"
    r"|worsening"
    r"|there|the|left|right|bibasilar|low|mildly|moderately|improving|decreas\w+|known|chronic|old|healed|residual"
    r"|slight|extensive|subtle|again|possible|probable|likely|only|just|simply|merely|marked|borderline|patchy"
    r"|improved)"
)

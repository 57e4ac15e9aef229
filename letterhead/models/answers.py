"""Which option a written answer names: what a model generated, or a teacher replied, in English or
Chinese.

An answer is read as one option or as none. The last declared one counts ("the answer is B",
"答案：B"). A bare letter counts only where it stands alone, since `A` and `I` are words too. Where
several are named, or one is denied ("not positive") and none is declared, the answer names none.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from letterhead.stats.metrics import NO_ANSWER

_OPEN = r"[\s*_`~\"'“‘(\[{<「『【《$]*"
_CLOSE = r"[\s*_`~\"'”’)\]}>」』】》$]*"
_LETTER = re.compile(
    r"(?<![A-Za-z0-9_+])(?<![A-Za-z]['’])[A-Za-z](?![A-Za-z0-9_+#])(?!['’][A-Za-z])"
)
_IS = r"(?:is|was|would be|will be|should be|must be|has to be|seems to be|appears to be)"
_IS_ZH = r"(?:应该|应当|应|就|只能|可以|似乎|最终|显然)?(?:是|为|选择|选|属于)"
_NOT = r"(?:not|never|no|isn['’]t|neither|nor|rather)\b"
_FILLER = (
    r"(?:(?:the|clearly|definitely|most "
    r"likely|likely|probably|therefore|thus|simply|just|indeed|obviously|now|still)\s+)*"
)
_NOUN = (
    r"(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:option|choice|letter|category|class|label|topic|answer)\s*:?\s*"
    r"|选项|类别|字母)?"
)

# What stands right before an option that is declared to be the answer.
_STRONG = re.compile(
    r"(?:"
    rf"\b(?:answer|conclusion|verdict)\b{_CLOSE}(?:(?:\s+\w+){{1,2}}\s+(?:question|text|article))?\s*(?:{_IS}\b)?\s*[:=\-–—>→]*"
    rf"|\b(?:option|choice|category|class|label|topic|letter|one|fit|match|selection|pick)\b{_CLOSE}"
    rf"(?:\s+(?:here|for this (?:text|article|review|question)))?\s*(?:{_IS}\b\s*:?|[:=→]|->|=>)"
    r"|(?<!\w)(?:therefore|thus|hence|so)\s*[,:]"
    rf"|\b(?:overall|in summary|in total|on "
    rf"balance)\b,?(?:\s+(?!{_NOT})[\w’']+){{0,4}}?\s*(?:{_IS}\b|[:,])"
    rf"|\b(?:classify|label|categori[sz]e|rate|call)\b(?:\s+(?!{_NOT})[\w’']+){{1,4}}?(?:\s+as)?"
    r"|\\boxed"
    rf"|(?:答案|结论|结果|类别|分类|选项|选择|标签|答){_CLOSE}\s*(?:{_IS_ZH})?\s*[:=→]*"
    rf"|(?:总体|整体|总的)(?:来说|而言|来看|上|评价|情绪|态度)?\s*,?\s*{_IS_ZH}"
    r"|(?:故|应该?|应当)选择?|最终选择?|为主,?\s*(?:故选|选)"
    r"|(?:所以|因此|综上(?:所述)?)\s*,?\s*(?:应该|应当|应|我)?(?:是|为|选择|选|属于)?\s*[:]?"
    rf"){_OPEN}{_FILLER}{_NOUN}{_OPEN}$",
    re.IGNORECASE,
)
# What stands right before an option that somebody says it is.
_WEAK = re.compile(
    r"(?:"
    r"\b(?:it|this|that|which|text|article|review|news|headline|message|post|passage|sentiment)\b"
    rf"\s*(?:['’]s|{_IS}|belongs (?:to|in|under)|falls (?:under|into|in)|fits(?: "
    rf"best)?(?: in| into| under)?|matches)\b\s*:?"
    r"(?:\s+(?:about|in|under|best described as|classified as|categori[sz]ed as))?"
    r"|\b(?:I|we)\b\s*(?:['’](?:d|ll|m)|would|will|am|have to|must|shall)?\s*(?:therefore\s+)?"
    r"(?:say|choose|chose|pick|picked|select|selected|think|guess|believe|answer|go(?:ing)? "
    r"(?:with|for)|vote for|"
    r"opt for)\b\s*:?"
    r"(?:\s+(?:it['’]s|it is|that it is|for|with))?"
    r"|\b(?:choose|pick|select|go with)\b\s*:?"
    rf"|(?:{_IS_ZH}|选择?|归(?:为|入|到)|判断为|认为是?|我选)\s*[:]?"
    rf"){_OPEN}(?:(?:an?|the)\s+)?{_FILLER}{_NOUN}{_OPEN}$",
    re.IGNORECASE,
)
_CALLED = re.compile(rf"(?:\b(?:option|choice|letter)\s*|选项|字母){_OPEN}$", re.IGNORECASE)
_IS_RIGHT = re.compile(
    rf"{_CLOSE}[.:]?\s*(?:{_IS}|seems|looks|fits)\s+(?:the\s+)?(?:most\s+|best\s+)?"
    r"(?:right|correct|best|answer|appropriate|likely|suitable|fitting|one|my answer)\b"
    rf"|{_CLOSE}(?:选?项)?(?:才)?(?:是)?(?:最)?(?:正确|对的|合适|恰当|符合|贴切)",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|nor|neither|no|nothing|without|exclud(?:e|ing)|except|unlike|cannot|hardly|"
    r"scarcely|barely|false|wrong|(?<!no )doubt|anything but|far from|hard to say|ruled? out|"
    r"ruling out|rather than|instead of|nothing to do with)\b|n['’]t\b)"
    r"(?:\s+(?:be|being|an?|the|about|in|to|of|for|at|all|so|much|any|really|exactly|quite|very|"
    r"clearly|particularly|especially|overly|think|believe|say|call|consider|it|it['’]s|is|that|"
    r"this|option|choice|category|class|label|answer))*"
    rf"\s*:?{_OPEN}$"
    r"|(?:不|不是|不为|不选|不该选|不属于|不算|不能算|不太|不怎么|难以|难说是?|算不上|谈不上|说不上|"
    rf"称不上|不会是|不可能是|并非|绝非|而非|没有|排除|除了|非)(?:选项)?{_OPEN}$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    rf"{_CLOSE}\s*(?:(?:is|are|was|seems|does|do|would|can|could|has|did)?\s*(?:not\b|n['’]t\b|cannot\b|can['’]t\b)"
    r"|(?:is|are|was|seems|looks)\s+(?:\w+\s+)?(?:wrong|incorrect|ruled "
    r"out|excluded|unlikely|out)\b)"
    rf"|{_CLOSE}(?:选?项)?(?:是)?(?:不对|不是|错的|错误|不正确|不符合|不合适|不恰当|可以排除|被排除|排除)",
    re.IGNORECASE,
)
_OR = re.compile(
    rf"{_CLOSE}[.:]?{_CLOSE}(?:,|/|\||&|\+|;|、|\bor\b|\band\b|\bvs\.?|\bas well as\b|\bbut also\b"
    r"|或者?|和|与|及|以及|还是)+"
    rf"(?:\s*(?:or|and|also|maybe|perhaps|possibly|even|也|可能))*\s*{_NOUN}{_OPEN}",
    re.IGNORECASE,
)
_BESIDE = re.compile(rf"{_CLOSE}[.:)\-–—=,、]*{_OPEN}")
_BEGIN = re.compile(rf"(?:^|[\n.!?。!?;])\s*(?:[-•>#]+\s*)?{_OPEN}$")
_AFTER_A_FIRST_LETTER = re.compile(
    rf"{_CLOSE}(?:[.:)、,;\-–—(=]|$|\n|\s(?:because|since|as|for|{_IS}|seems|fits|matches|best)\b|\s*(?:因为|。|是|项))"
)
_AFTER_AN_OPTION = re.compile(
    rf"{_CLOSE}(?:[.,:;!?)(。、\-–—]|\s(?:because|since|as|for|or|and|but|{_IS})\b)|[^\x00-\x7f]"
)
_WRAPPED_BEFORE = re.compile(r"[(\[{<「『【《*`\"'“‘]\s*$")
_WRAPPED_AFTER = re.compile(r"\s*[)\]}>」』】》*`\"'”’]")
_LAST_ON_A_LINE = re.compile(rf"{_CLOSE}[.!。]?{_CLOSE}(?=\n|$)")
_BEHIND_A_MARK = re.compile(rf"(?:->|=>|[:=→–—]|(?<=\s)-){_OPEN}$")
# "Is it B?", "B, if it were about sports"
_ASKED = re.compile(r"[^.!?\n。！？]*[?？]|\s*吗|\s+if\b")
_CORRECTED = re.compile(
    r"\b(?:wait|actually|correction|on second thought|on reflection|no)\s*[,.:!]"
    r"|更正|等等|不对|不,",
    re.IGNORECASE,
)
_WORDS = frozenset("AI")  # letters that are words, too
_WINDOW = 90  # characters around a mention that decide how it is meant


@dataclass
class _Mention:
    """A place where a text names an option.

    declared : 2 by words like "the answer is", 1 by words like "it is", else 0
    """

    start: int
    stop: int
    option: int
    declared: int
    denied: bool


def read_answer(
    text: str, ended: bool, options: Sequence[str], labels: Sequence[str] = ()
) -> tuple[int, str]:
    """The option that a generated answer names behind its thought; of a model that did not think,
    in all of it.

    Returns
    -------
    tuple : the option's number or NO_ANSWER; `answered`, `unfinished` (the budget, or the answer,
        ended before the thought did) or `unparsed` (no option named, several, or one that is
        denied)
    """
    _, thought, rest = text.rpartition("</think>")
    if not thought and (not ended or "<think>" in text):
        return NO_ANSWER, "unfinished"
    option = named_option(rest, options, labels)
    return option, "unparsed" if option == NO_ANSWER else "answered"


def named_option(text: str, options: Sequence[str], labels: Sequence[str] = ()) -> int:
    """The number of the one option that a text names, in any case and width, or NO_ANSWER.

    Parameters
    ----------
    options : letters, or names
    labels : what the options stand for, in their order; a label named alone stands for its option
    """
    text = _plain(text)
    option = _read(text, options, labels)
    # Behind "wait, no" the answer is another one, if there is one.
    for corrected in reversed(list(_CORRECTED.finditer(text))):
        said_before = _mentions(text[: corrected.start()], options, labels)
        again = _read(text[corrected.end() :], options, labels)
        if said_before and again != NO_ANSWER:
            return again
    return option


def _read(text: str, options: Sequence[str], labels: Sequence[str]) -> int:
    lettered = all(re.fullmatch("[A-Za-z]", option) for option in options)
    mentions = _mentions(text, options, labels)
    return _choose(text, [one for one in mentions if not _ASKED.match(text[one.stop :])], lettered)


def _mentions(text: str, options: Sequence[str], labels: Sequence[str]) -> list[_Mention]:
    """Where a text names an option, by its letter or its label."""
    lettered = all(re.fullmatch("[A-Za-z]", option) for option in options)
    names = _names(text, labels or options)
    if lettered:
        letters = _letters(text, [option.upper() for option in options])
        if letters:
            beside = [
                name
                for name in names
                if any(_BESIDE.fullmatch(text[m.stop : name.start]) for m in letters)
            ]
            names = [*beside, *(name for name in names if name.denied and name not in beside)]
        return sorted([*letters, *names], key=lambda mention: mention.start)
    return names


def _choose(text: str, mentions: list[_Mention], lettered: bool) -> int:
    affirmed = [mention for mention in mentions if not mention.denied]
    denied = [mention for mention in mentions if mention.denied]
    declared = [mention for mention in affirmed if mention.declared == 2]
    if declared:
        last = declared[-1]
        rivals = [
            other
            for other in affirmed
            if other.option != last.option and _linked(text, last, other, lettered)
        ]
        taken_back = [
            other for other in denied if other.option == last.option and other.start > last.start
        ]
        return NO_ANSWER if rivals or taken_back else last.option
    named = {mention.option for mention in affirmed}
    if len(named) != 1 or named & {mention.option for mention in denied}:
        return NO_ANSWER
    if denied and not any(mention.declared for mention in affirmed):
        return NO_ANSWER
    return named.pop()


def _linked(text: str, one: _Mention, other: _Mention, lettered: bool) -> bool:
    """Whether two mentions are alternatives ("B or C"), or, of letters, one is explained by the
    other ("B. World")."""
    first, second = sorted([one, other], key=lambda mention: mention.start)
    between = text[first.stop : second.start]
    return len(between) < _WINDOW and bool(
        _OR.fullmatch(between) or (lettered and _BESIDE.fullmatch(between))
    )


def _names(text: str, labels: Sequence[str]) -> list[_Mention]:
    """Where a text names a label, in any case; of labels that hold each other the longest. (Edges
    of ASCII words only: other scripts write no spaces.)"""
    plain = [_plain(label).strip() for label in labels]
    longest = sorted((i for i in range(len(plain)) if plain[i]), key=lambda i: -len(plain[i]))
    if not longest:
        return []
    pattern = "|".join(f"({re.escape(plain[i])})" for i in longest)
    found = re.finditer(rf"(?<![A-Za-z0-9_])(?:{pattern})(?![A-Za-z0-9_])", text, re.IGNORECASE)
    return [
        _mention(text, match.start(), match.end(), longest[match.lastindex - 1]) for match in found
    ]


def _letters(text: str, options: Sequence[str]) -> list[_Mention]:
    """Where a text names an option's letter."""
    candidates = [
        _mention(text, match.start(), match.end(), options.index(match[0].upper()))
        for match in _LETTER.finditer(text)
        if match[0].upper() in options
    ]
    mentions = [one for one in candidates if _stands_for_an_option(text, one)]
    more = True
    while more:  # "B or C": the second letter is an option since the first is one
        more = [
            one
            for one in candidates
            if one not in mentions
            and text[one.start].isupper()
            and not _may_be_a_word(text, one)
            and any(_linked(text, one, other, lettered=False) for other in mentions)
        ]
        mentions += more
    return sorted(mentions, key=lambda mention: mention.start)


def _around(text: str, start: int, stop: int) -> tuple[str, str]:
    """What stands before and behind a mention, as far as it decides; a cut-off beginning starts
    with a word of its own."""
    begin = max(0, start - _WINDOW)
    return ("…x " if begin else "") + text[begin:start], text[stop : stop + _WINDOW]


def _stands_for_an_option(text: str, mention: _Mention) -> bool:
    letter = text[mention.start]
    before, after = _around(text, mention.start, mention.stop)
    upper, at_end = letter.isupper(), bool(_LAST_ON_A_LINE.match(after))
    if _WRAPPED_BEFORE.search(before) and _WRAPPED_AFTER.match(after):
        return True
    if after.startswith(")") or (
        at_end and (_BEGIN.search(before) or _BEHIND_A_MARK.search(before))
    ):
        return True
    if _BEGIN.search(before) and _AFTER_A_FIRST_LETTER.match(after):
        if upper:
            return not (letter == "I" and after.startswith(","))  # "I, for one, am not sure"
        return bool(re.match(rf"{_CLOSE}[.:)、]", after))  # "b. Sports"
    if mention.denied:
        return upper or at_end
    if not (mention.declared or _CALLED.search(before)):
        return False
    return not _may_be_a_word(text, mention)


def _may_be_a_word(text: str, mention: _Mention) -> bool:
    """Whether a letter may be an article or a pronoun ("the answer is a sports article"): a small
    letter, A and I, unless the sentence ends or goes on as behind an option."""
    letter = text[mention.start]
    if letter.isupper() and letter not in _WORDS:
        return False
    after = _around(text, mention.start, mention.stop)[1]
    return not (_LAST_ON_A_LINE.match(after) or _AFTER_AN_OPTION.match(after))


def _mention(text: str, start: int, stop: int, option: int) -> _Mention:
    before, after = _around(text, start, stop)
    denied = bool(_DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after))
    strong = bool(_STRONG.search(before) or _IS_RIGHT.match(after))
    return _Mention(start, stop, option, 2 if strong else 1 if _WEAK.search(before) else 0, denied)


def _plain(text: str) -> str:
    """A text in one width, full-width letters and signs as ASCII, and without runs of blanks."""
    lines = unicodedata.normalize("NFKC", text).splitlines()
    return "\n".join(" ".join(line.split()) for line in lines if line.strip())

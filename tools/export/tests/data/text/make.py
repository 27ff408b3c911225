"""Writes clip_cleaning.json: python make.py, with open_clip_torch 2.24.0's tokenizer.py and ftfy on the path."""

import json
import random

import ftfy
from open_clip.tokenizer import SimpleTokenizer

tokenizer = SimpleTokenizer()
texts = [
    "ﬁne ﬂowers, ﬀ ﬃ ﬄ ﬅ ﬆ", "Ĳsland ĳ ŉ Ǆ ǅ ǆ Ǉ ǈ ǉ Ǌ ǋ ǌ Ǳ ǲ ǳ", "‘single’ ‛ ‚low „quotes‟ ʼ", "“double”",
    "ｆｕｌｌ　ｗｉｄｔｈ　１２３！", "ﾊﾝｶｸ ｶﾞ", "cafe\u0301 n\u0303 A\u030a", "zero\u200bwidth soft\u00adhyphen \u2060 join",
    "bom \ufeff inside \u206a \ufff9x\ufffa", "bell\x07 tab\tvertical\x0bform\x0cfeed \x1f end\x7f", "\x1b[31mred\x1b[0m text",
    "&amp;amp; &amp;lt;b&amp;gt;", "&lt;p&gt; &quot;q&quot; &#39;a&#39; &#x27; &nbsp; &copy; &eacute; &hellip;", "<b>&eacute;&amp;amp;</b>",
    "&notanentity; &amp no semicolon &copy 2024 &#0; &#128512; &#xD800; &#1114112;", "AT&T R&D a&b", "ΑΣ ΟΔΟΣ Σ İstanbul ẞ ŒUVRE",
    "line\nbreak\r\nand\rmore\u2028sep\u2029para\u0085next", "\u00a0nbsp\u2003em\u3000ideographic", "１２ ② ½ ³ Ⅷ", "it'S we'RE I'LL 'tis rock'n'roll '",
    "a'ſ b'S", "!!!???...---___***", "😀👍🏽👩‍👩‍👧 flags 🇩🇪", "नमस्ते สวัสดี مرحبا שלום 한국어", "   ", "\t\n", "x" * 300, "ab" * 200, "🙂" * 40,
    "don’t won’t it’s", "…—–−", "\u0000nul", "a\u0301\u0301\u0301", "\u1100\u1161\u11a8", "ﷺ ﬗ", "&amp;amp;amp;amp;amp;lt;", "&#8220;curly&#8221; &rsquo;",
    "\x80 \x81 \x85 \x91quoted\x92 \x93twice\x94 \x9f",
]
random.seed(3)
alphabet = list("abcXYZ012 '.,!?-&;#<>\"\t") + [
    "’", "“", "é", "e\u0301", "ß", "Σ", "İ", "ﬁ", "ｗ", "　", "中", "か", "か\u3099", "😀", "\u200d", "&amp;", "&lt;", "'s", "'LL", "٣", "²", "Ⅳ", "\u00a0",
]
for _ in range(120):
    texts.append("".join(random.choice(alphabet) for _ in range(random.randint(1, 40))))


def kept(text):
    """Not taken for wrongly decoded, but for C1 controls, which are replaced wherever they stand."""
    return ftfy.fix_encoding(text) == text or any("\x80" <= c <= "\x9f" for c in text)


cases = [[text, tokenizer.encode(text)] for text in texts if kept(text)]
with open("clip_cleaning.json", "w", encoding="utf-8") as out:
    out.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")

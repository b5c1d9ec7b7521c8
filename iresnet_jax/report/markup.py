"""HTML that is escaped by construction, the sheet it is set in, and numbers written for people.

``tag`` escapes every child that is not itself the result of ``tag``, so text from a run can never become markup.
"""

import html
import math
import numbers
from collections.abc import Iterable
from typing import Any

MINUS = "\N{MINUS SIGN}"  # as wide as a plus, unlike the hyphen
_VOID = {"meta", "img"}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Html(str):
    """Markup that needs no more escaping."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Writes one element.

    Args:
        name: Element name.
        *children: ``Html`` is kept, anything else is turned into text and escaped.
        **attributes: Escaped; a trailing underscore is dropped (``class_``), others become hyphens, ``True`` writes the bare
            name, ``None`` and ``False`` write nothing.

    Example:
        >>> tag("p", "1 < 2", class_="note")
        '<p class="note">1 &lt; 2</p>'
    """
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written += f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    """Concatenates markup and text, escaping the text."""
    return Html("".join(child if isinstance(child, Html) else html.escape(str(child)) for child in children))


def table(header: Iterable[object], rows: Iterable[Iterable[object]], *, caption: str) -> Html:
    """Writes a table with a header row; the first cell of every row is that row's header."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", *(tag("td", c) if i else tag("th", c, scope="row") for i, c in enumerate(row))) for row in rows]
    inner = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def document(*body: object, title: str) -> Html:
    """Writes a whole page that loads nothing: its content security policy forbids all but inline styles and data URIs."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(_SHEET)),
    )
    return join((Html("<!doctype html>\n"), tag("html", head, "\n", tag("body", *body), lang="en"), "\n"))


def number(value: Any, digits: int = 4) -> str:
    """Writes a number with that many significant digits; integers in full, tiny and huge ones as powers of ten.

    Example:
        >>> number(60000), number(0.93217), number(1.28e-7, 2)
        ('60,000', '0.9322', '1.3 × 10⁻⁷')
    """
    if value is None:
        return "not recorded"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    value = float(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else MINUS + "∞"
    if value == 0.0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if not -4 <= power < max(digits, 5):
        return f"{mantissa.replace('-', MINUS)} \N{MULTIPLICATION SIGN} 10{str(power).translate(_SUPERSCRIPTS)}"
    return signed(value, max(digits - 1 - power, 0))


def uncertain(mean: Any, stderr: Any) -> str:
    """Writes ``mean ± stderr``: the error with two significant digits, the mean to the same decimal.

    Example:
        >>> uncertain(1.062314, 0.00213), uncertain(1.062314, None)
        ('1.0623 ± 0.0021', '1.062')
    """
    if mean is None or stderr is None or not (math.isfinite(mean) and math.isfinite(stderr)) or stderr <= 0.0:
        return number(mean) if stderr is None or stderr == 0.0 else f"{number(mean)} ± {number(stderr, 2)}"
    decimals = max(1 - int(f"{stderr:.1e}".split("e")[1]), 0)
    if decimals > 8:
        return f"{signed(float(mean), 8)} ± {number(stderr, 2)}"
    return f"{signed(float(mean), decimals)} ± {signed(float(stderr), decimals)}"


def duration(seconds: Any) -> str:
    """Writes a time in the unit a person would choose.

    Example:
        >>> duration(0.0831), duration(75.0), duration(7384)
        ('83.1 ms', '1 min 15 s', '2 h 3 min')
    """
    if seconds is None or not math.isfinite(seconds) or seconds < 0.0:
        return number(seconds)
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (59.95, 1.0, "s")):
        if seconds < limit:
            return f"{number(float(seconds) * scale, 3)} {unit}"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"


def signed(value: float, decimals: int, *, plus: bool = False) -> str:
    """Writes fixed decimals with thousands separated and a true minus sign, and a plus if asked for."""
    return f"{value:{'+' * plus},.{decimals}f}".replace("-", MINUS)


_SHEET = """
:root{--page:#fbfbfa;--card:#fff;--ink:#1d2228;--soft:#5a6470;--line:#e2e5e8;--accent:#2a66b1;--good:#1c7048;--warn:#9a5200;
--warn-ground:#fff6e8;--shadow:0 1px 2px #0000000d}
@media(prefers-color-scheme:dark){:root{--page:#121519;--card:#1a1e24;--ink:#e3e7ec;--soft:#9ba6b3;--line:#2d343d;
--accent:#7db2f2;--good:#6cc79a;--warn:#eeb066;--warn-ground:#2c2314;--shadow:none}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",
Roboto,"Noto Sans","Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
header,main,footer{max-width:66rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:3rem}
h1{font-size:clamp(1.6rem,1.2rem + 2vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .4rem;text-wrap:balance}
h2{font-size:1.25rem;letter-spacing:-.01em;margin:0 0 .75rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p{max-width:46rem;margin:.5rem 0}
a{color:var(--accent)}
code,.tree{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.85em}
.soft,figcaption,footer{color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;margin:1.2rem 0 0;padding:.6rem 0;border-block:1px solid var(--line);
font-size:.9rem}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
section{margin:2.6rem 0;scroll-margin-top:1rem}
aside{margin:1.6rem 0 0;padding:.8rem 1.1rem;background:var(--warn-ground);border-left:4px solid var(--warn);border-radius:6px}
aside ul{margin:.3rem 0 0;padding-left:1.2rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:1rem;margin:0 0 1.8rem}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.1rem 1.2rem;box-shadow:var(--shadow)}
.tile h3{font-size:.82rem;font-weight:600;color:var(--soft);margin:0}
.tile p{font-size:.86rem;line-height:1.45;color:var(--soft);margin:.6rem 0 0}
.value{font-size:1.35rem;font-weight:650;letter-spacing:-.02em;line-height:1.3;color:var(--ink);margin:.3rem 0 0}
.unit{display:flex;justify-content:space-between;align-items:center;gap:.5rem;font-size:.86rem;color:var(--soft)}
.badge{display:inline-block;font-size:.72rem;line-height:1;font-weight:600;padding:.28em .6em;border-radius:99px;
border:1px solid currentColor;color:var(--soft)}
.badge.guaranteed{color:var(--good)}
.badge.conditional{color:var(--warn)}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:0 2.5rem;align-items:start}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem}
caption{text-align:left;color:var(--soft);font-size:.86rem;padding-bottom:.4rem}
th,td{padding:.38rem .9rem .38rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left}
tbody th{font-weight:500}
thead th{font-weight:600;color:var(--soft);font-size:.82rem}
th:last-child,td:last-child{padding-right:0}
.words td{white-space:normal;overflow-wrap:anywhere}
.words td,.words th{text-align:left;vertical-align:top}
.narrow table{width:auto;min-width:min(100%,22rem)}
.narrow th,.narrow td{padding-right:2.2rem}
.bar{display:inline-block;width:3.5rem;height:.5rem;margin-left:.7rem;border-radius:99px;background:var(--line);overflow:hidden}
.bar i{display:block;height:100%;background:var(--accent)}
figure{margin:1rem 0;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem 1.1rem;
box-shadow:var(--shadow)}
figure img{display:block;max-width:100%;height:auto;margin:0 auto}
figure img.chart{width:100%}
figure img.picture{max-height:44rem}
figcaption{font-size:.86rem;line-height:1.45;margin-top:.7rem;max-width:46rem}
details{margin:.5rem 0}
summary{cursor:pointer;font-weight:500}
.tree ul{list-style:none;margin:.1rem 0 .3rem;padding-left:1.1rem;border-left:1px solid var(--line)}
.tree li{overflow-wrap:anywhere}
.tree b{font-weight:500;color:var(--accent)}
footer{font-size:.86rem;padding-block:1rem 3rem;border-top:1px solid var(--line)}
@media(max-width:40rem){th,td{padding-right:.55rem}.bar{display:none}table{font-size:.86rem}
header{padding-top:1.6rem}section{margin:2rem 0}.wide{overflow-x:auto}
.wide img.chart{width:44rem;max-width:none}}
@media print{nav{display:none}section,figure,.tile{break-inside:avoid}}
"""

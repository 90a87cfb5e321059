"""What a hostile notebook may hold, and what no page may hold."""

import re
from html.parser import HTMLParser
from typing import Any

from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

RUN = "window.pwned=1,document.title=String(1)"
# Each tries to run something, to load something, to redirect, or to take the place of a part of the page.
SNIPPETS = [
    f"<script>{RUN}</script>",
    f"<SCRIPT SRC=data:text/javascript,{RUN}></SCRIPT>",
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    f"<script\x00>{RUN}</script>",
    f"<script type=module>{RUN}",
    f"<img src=x onerror={RUN}>",
    f"<img src=x onerror\x0c=\x0b{RUN}>",
    f"<img src='x'onerror='{RUN}'/>",
    f'<img """><script>{RUN}</script>">',
    f"<svg onload={RUN}>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg><a xlink:href='javascript:{RUN}'><text>x</text></a></svg>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s></svg>",
    "<svg><use href='data:image/svg+xml;base64,PHN2Zy8+#x'/><image href='https://x.example/a.png'/></svg>",
    f"<svg><style><img src=x onerror={RUN}></style></svg>",
    f"<svg></p><style><a id='</style><img src=x onerror={RUN}>'>",
    f"<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=x onerror={RUN}&gt;'>",
    f"<form><math><mtext></form><form><mglyph><style></math><img src=x onerror={RUN}>",
    f"<math><annotation-xml encoding='text/html'><img src=x onerror={RUN}></annotation-xml></math>",
    f"<math href='javascript:{RUN}'><mi xlink:href='javascript:{RUN}'>x</mi></math>",
    f"<noscript><p title='</noscript><img src=x onerror={RUN}>'>",
    f"<template><script>{RUN}</script></template>",
    f"<textarea><img title='</textarea><img src=x onerror={RUN}>'>",
    f"<xmp><p title='</xmp><img src=x onerror={RUN}>'>",
    f"<title><img title='</title><img src=x onerror={RUN}>'>",
    f"<!--><img src=x onerror={RUN}>-->",
    f"<![CDATA[><img src=x onerror={RUN}>]]>",
    f"<?xml ><img src=x onerror={RUN}>?>",
    f"<select><style></select><img src=x onerror={RUN}></style>",
    f"<a href='javascript:{RUN}'>x</a>",
    f"<a href=' &#106;ava\nscript&colon;{RUN}'>x</a>",
    "<a href='vbscript:x'>x</a><a href='file:///etc/passwd'>x</a><a href='//x.example'>x</a>",
    f"<a href='data:text/html,<script>{RUN}</script>'>x</a>",
    f"[x](javascript:{RUN}) [y](<data:text/html,{RUN}>) <javascript:{RUN}>",
    f"![x](javascript:{RUN}) ![\"onerror={RUN} x=](https://x.example/a.png)",
    f"[x](https://x.example/' \"onmouseover={RUN}\")",
    f"<iframe src='javascript:{RUN}'></iframe>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f"<object data='data:text/html,<script>{RUN}</script>'></object><embed src='https://x.example'>",
    "<base href='https://x.example/'>",
    "<meta http-equiv=refresh content='0;url=https://x.example'>",
    "<link rel=stylesheet href='https://x.example/a.css'><link rel=prefetch href='https://x.example/b'>",
    f"<form action='https://x.example'><input name=a autofocus onfocus={RUN}>"
    f"<button formaction='javascript:{RUN}'>x</button></form>",
    "<style>@import 'https://x.example/a.css'; #T_a{background:url(https://x.example/b)} body{display:none}</style>",
    "<div style='background:url(https://x.example/a);position:fixed;inset:0;z-index:9'>x</div>",
    f"<div style='width:expression({RUN});-moz-binding:url(https://x.example/b);background:\\75rl(https://x.example)'>x</div>",
    "<p style='background:image-set(\"https://x.example/a\" 1x)' background='https://x.example/b'>x</p>",
    "<video poster='https://x.example/a' src='https://x.example/b' autoplay></video><audio src='https://x.example/c'></audio>",
    "<img src='https://x.example/a.png' srcset='https://x.example/b 1x'><img src='data:text/html;base64,PHNjcmlwdD4='>",
    f"<details open ontoggle={RUN}><summary>x</summary></details><marquee onstart={RUN}>x</marquee>",
    "<div id='show-code' class='only-code runs switch scroll'>x</div><a id=body name=body>x</a>"
    "<img name=getElementById>",
    "<p class=runs>x</p><p class=only-code>x</p><p class=switch>x</p><p class='facts status'>x</p>",
    f"<table><td background='https://x.example/a'><td onclick={RUN}>1</table></td></table>"
    "</section></main></body></html>",
    f"</pre></code></div><plaintext><img src=x onerror={RUN}>",
    f"$x$ $\\href{{javascript:{RUN}}}{{x}}$ $$\\text{{</math><img src=x onerror={RUN}>}}$$",
    f"$\\style{{background:url(https://x.example)}}{{x}}$ $<img src=x onerror={RUN}>$ <i title='$a$ onclick={RUN}'>",
    f"```html\"onclick={RUN}\n</code></pre><img src=x onerror={RUN}>\n```",
    f"```mermaid\nclick a call {RUN}\n</pre><script>{RUN}</script>\n```",
    f"{{{{ self.__init__.__globals__ }}}} {{% raw %}} ${{{RUN}}} {{# <script>{RUN}</script> #}}",
]  # fmt: skip
NEVER = {
    "script", "iframe", "object", "embed", "base", "form", "svg", "video", "audio", "template", "noscript", "textarea",
    "select", "frame",
}  # fmt: skip
NAMES = sorted(NEVER) + [
    "style",
    "math",
    "mtext",
    "mi",
    "mglyph",
    "table",
    "td",
    "p",
    "a",
    "img",
    "title",
    "div",
    "b",
    "pre",
]
PARTS = [
    *"x<>'\"=/\n\x00$`", "&lt;", "&#62;", "]]>", "<!--", "-->", f"onerror={RUN} ", "src=x ", "href='javascript:x'",
    "style='background:url(x)'", "<annotation-xml ", "<foreignObject>",
    *(f"<{end}{name}{close}" for end in ("", "/") for close in (">", " ") for name in NAMES),
]  # fmt: skip
LOADS = {"name", "srcset", "action", "data", "poster", "background", "xlink:href"}
ADDRESSES = {
    "href": r"(?:https?://|mailto:|#|data:,$|index\.html$)",
    "src": r"data:image/[a-z+]+;base64,[\w+/=\s]*$",
}
OWN = {"show-code", "runs"}
LAYOUT = {"switch", "only-code", "runs", "batch", "facts", "status", "reason", "standin"}


def cells(snippet: str, png: str) -> list:
    """A notebook's cells with the snippet in every place that a notebook has."""
    plain = snippet.replace("\x00", "")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><title>{plain}</title>{plain}</svg>'
    htmls = [
        snippet, f"<table><tr><td>{snippet}</td></tr></table>", f"<p title='{snippet}'>words</p>",
        f'<img alt="{snippet}" src="data:image/png;base64,{png}">',
    ]  # fmt: skip
    told = dict.fromkeys(["note", "kind", "heading", "seen"], snippet)
    plotly = {"layout": {"title": {"text": snippet}}}
    outputs = [
        new_output("stream", name="stdout", text=snippet),
        new_output("stream", name="stderr", text=snippet),
        new_output("error", ename=snippet, evalue=snippet, traceback=[snippet]),
        *(new_output("display_data", data=data) for data in (
            *({"text/html": html} for html in htmls), {"text/plain": snippet}, {"text/markdown": snippet},
            {"text/latex": f"${snippet}$"}, {"image/svg+xml": svg},
            {"image/png": snippet}, {"application/javascript": snippet}, {"application/vnd.plotly.v1+json": plotly},
            {"application/vnd.jupyter.widget-view+json": {"model_id": snippet}, "text/plain": f"{snippet}(x)"},
        )),
        new_output("display_data", data={"image/png": png}, metadata={"image/png": {"width": snippet, "height": -1}}),
    ]  # fmt: skip
    return [
        new_markdown_cell(f"# {snippet}"),
        new_markdown_cell(snippet),
        new_markdown_cell(f"| a |\n|---|\n| {snippet} |\n\n> - {snippet}\n\n![{snippet}](attachment:a.png '{snippet}')",
                          attachments={"a.png": {"image/png": png}}),
        new_markdown_cell("![a](attachment:b)", attachments={"b": {"image/svg+xml": snippet}}),
        new_code_cell(snippet, outputs=outputs, metadata=told | {"alt": snippet, "tags": ["headline-figure"]}),
        new_markdown_cell(f"What we see. {snippet}", metadata=told),
    ]  # fmt: skip


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.inside, named = tag, dict(attrs)
        if tag in NEVER:
            self.found.append(tag)
        elif tag == "meta" and named.get("http-equiv", "Content-Security-Policy") != "Content-Security-Policy":
            self.found.append(f"meta {named}")
        elif tag == "link" and named != {"rel": "icon", "href": "data:,"}:
            self.found.append(f"link {named}")
        for name, value in attrs:
            allowed = ADDRESSES.get(name)
            if name.startswith("on") or (name in LOADS and tag != "meta"):
                self.found.append(f"{tag} {name}")
            elif allowed and not re.match(allowed, value or "", re.IGNORECASE):
                self.found.append(f"{tag} {name}={value}")
            elif name == "style":
                self._css(value or "")
            elif name == "id" and value in OWN and tag != "input":
                self.found.append(f"{tag} id={value}")

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self._css(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def _css(self, css: str) -> None:
        self.found += re.findall(r"url\(|@import|expression|image-set|-moz-binding|\\", css.replace('"\\', ""))


def offences(html: str) -> list[str]:
    """What stands in some HTML although it may run, load or disguise something."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.found

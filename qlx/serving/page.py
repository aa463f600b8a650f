"""The page at `/`: one form for the first model, no assets from anywhere."""

import html

from qlx.serving.engine import Engine

__all__ = ["PAGE_POLICY", "page"]

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


def page(engine: Engine) -> str:
    """HTML with a form for text or for an image, by the engine's task."""
    form, script = _TEXT_FORM, _TEXT_SCRIPT
    if engine.text is None:
        path, button = ("locate", "Locate") if engine.keypoints else ("classify", "Classify")
        form = _IMAGE_FORM.replace("BUTTON", button)
        script = _IMAGE_SCRIPT.replace("PATH", path)
    name = html.escape(engine.name)
    manifest = engine.manifest
    about = html.escape(f"{manifest.kind}, {manifest.task}")
    return _PAGE.format(name=name, about=about, form=form, script=script)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem; }}
textarea, pre {{ width: 100%; box-sizing: border-box; font: 14px/1.4 ui-monospace, monospace; }}
pre {{ background: #f4f4f4; color: #111; padding: 1rem; white-space: pre-wrap; min-height: 3rem; }}
h1 {{ font-size: 1.2rem; overflow-wrap: anywhere; }}
label {{ display: block; margin: .5rem 0; }}
</style>
<h1>{name}</h1>
<p>{about}</p>
{form}
<pre id="out" aria-live="polite"></pre>
<script>
const out = document.getElementById("out");
{script}
</script>
</html>
"""

_IMAGE_FORM = """<form id="ask"><label>Image <input type="file" id="file" accept="image/*" required></label>
<button>BUTTON</button></form>"""

_IMAGE_SCRIPT = """document.getElementById("ask").onsubmit = async (submit) => {
  submit.preventDefault();
  const file = document.getElementById("file").files[0];
  const headers = {"content-type": "application/octet-stream"};
  const answer = await fetch("v1/PATH", {method: "POST", headers, body: file});
  out.textContent = JSON.stringify(await answer.json(), null, 2);
};"""

_TEXT_FORM = """<form id="ask"><label>Prompt <textarea id="prompt" rows="5" required></textarea></label>
<label>Tokens <input id="tokens" type="number" value="64" min="1"></label>
<button>Continue</button></form>"""

_TEXT_SCRIPT = """document.getElementById("ask").onsubmit = async (submit) => {
  submit.preventDefault();
  const prompt = document.getElementById("prompt").value;
  const max_tokens = Number(document.getElementById("tokens").value);
  const headers = {"content-type": "application/json"};
  const body = JSON.stringify({prompt, max_tokens});
  const answer = await fetch("v1/completions", {method: "POST", headers, body});
  const value = await answer.json();
  out.textContent = value.error ? value.error.message : prompt + value.choices[0].text;
};"""

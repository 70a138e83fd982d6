"""``report.html``: one file with its films and figures inside, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import imageio.v2 as imageio
import jinja2
from markupsafe import Markup, escape
from PIL import Image

from ..files import inside, read_bytes
from .sections import Section, media, run_name

MAX_BYTES = 10_000_000  # of the page
_FIGURES = 3_000_000  # of them for figures
_RESERVE = 100_000  # for what is not counted
_FIGURE_WIDTH, _STILL_WIDTH = 1200, 480  # pixels
_STILL_BYTES = 30_000  # at most, as text
_QUALITY = 82  # of WebP, in percent
_MAX_PIXELS = 40_000_000  # of a figure; a file from elsewhere may expand to more than the memory
_MOMENTS = "07_moments.png"  # the images of explain.json's moments, side by side
HINTS = {  # below the alt text that a figure has from the function that drew it
    "01_frames.png": "Frames of a training demonstration, as the policy's cameras see them.",
    "04_training.png": "A low loss does not imply a high success rate.",
    "05_search.png": "All configurations of the search, ranked.",
    "07_depth.png": "Measured on held-out demonstrations; the dotted line is the training depth.",
    "07_predictions.png": "Actions of four held-out samples: demonstrated in blue, predicted in "
                          "orange; errors on average.",
    "07_recursion.png": "A recursion that has converged stops changing its state.",
    "07_saliency.png": "Bright pixels contribute most to the action; they should lie on the "
                       "gripper, the object and the target. Black pixels of the image get nothing.",
}


def render(run: Path, sections: Mapping[str, Section]) -> str:
    """The page; successes whose films do not fit in ``MAX_BYTES`` are shown as stills first."""
    here = resources.files(__package__)
    script, style = ((here / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = _code
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    figures = Figures(run)
    shown = {name: figures.all(section.figures) for name, section in sections.items()}
    absent = [key for key, section in sections.items() if section.missing and not shown[key]]
    used = {figure for section in sections.values() for figure in section.figures} | {_MOMENTS}
    others = [name for name in media(run, "figures/*.png") if Path(name).name not in used]
    moments = sections["inside"].shown.get("moments", [])
    left_out = figures.left_out
    content = {
        "name": run.name, "run_name": run_name(run), "sections": sections, "figures": shown,
        "absent": absent, "script": script, "style": style,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "moment_images": figures.parts(_MOMENTS, len(moments)),
        "others": figures.all(Path(name).name for name in others), "left_out": left_out}
    empty = {"films": {}, "stills": {}, "hero": None, "not_embedded": 0}
    free = MAX_BYTES - _RESERVE - len(template.render(**content, **empty).encode())
    return template.render(**content, **_films(run, sections, free, left_out))


def _code(text: str) -> Markup:
    """The text for HTML, with what stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _films(run: Path, sections: Mapping[str, Section], free: int, left_out: list[str]) -> dict:
    """Films and stills by the number of their episode, as many as fit; the film of the task."""
    stills = {}

    def has_still(film: Mapping) -> bool:
        try:
            if film["video"]:
                stills[film["number"]] = _still(film["video"])
        except Exception as error:  # ffmpeg's, of a damaged film
            left_out.append(f"{film['video'].name} ({type(error).__name__})")
        return film["number"] in stills

    demonstration = {"number": "demonstration", "outcome": "success", "change": "",
                     "video": inside(run, "videos/01_demonstration.mp4")}
    filmed = [*filter(has_still, sections["episodes"].shown.get("episodes", []))] or [
        *filter(has_still, [demonstration])]
    first = min(filmed, default=None,
                key=lambda each: (bool(each["change"]), each["outcome"] != "success"))
    hero = first and {"number": first["number"], "caption": (
        "A demonstration of the training data." if first is demonstration
        else f"{first['task']}, {first['start']}. {first['end']}"
             + f" Not the run's own evaluation: {first['change']}." * bool(first["change"]))}
    ordered = sorted(filmed, key=lambda each: (each is not first, each["outcome"] == "success"))
    # at most half of the room is for stills, or many of them would leave none for films
    room = max(0, free) // (2 * _STILL_BYTES)
    wanted = {each["number"]: each["video"] for each in ordered[:room]}
    films = {}
    free -= _STILL_BYTES * len(wanted)  # of a film that does not fit
    for number, path in wanted.items():
        if film := _embedded(path, "video/mp4", free + _STILL_BYTES):
            films[number], free = film, free + _STILL_BYTES - len(film)
    not_embedded = len(filmed) - len(films)
    stills = {number: stills[number] for number in wanted
              if number not in films or hero["number"] == number}  # printed pages show no film
    return {"films": films, "stills": stills, "hero": hero, "not_embedded": not_embedded}


def _embedded(path: Path, kind: str, most: int) -> str:
    """A file as a ``data:`` URL of at most ``most`` characters; else empty."""
    return _url(read_bytes(path), kind) if 4 * path.stat().st_size / 3 + 100 < most else ""


def _url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _still(film: Path) -> str:
    """A frame near the end of a film, in the best quality that ``_STILL_BYTES`` allow."""
    with imageio.get_reader(film) as reader:
        meta = reader.get_meta_data()
        last = reader.get_data(max(0, round(meta["duration"] * meta["fps"]) - 5))
    for quality in (_QUALITY, 50, 20, 1):
        still = _webp(Image.fromarray(last), _STILL_WIDTH, quality)
        if len(still) <= _STILL_BYTES:
            return still
    raise ValueError(f"a still has {len(still)} characters; expected at most {_STILL_BYTES}")


def _webp(image: Image.Image, width: int, quality: int = _QUALITY) -> str:
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return _url(buffer.getvalue(), "image/webp")


class Figures:
    """The figures of a run as WebP, until their share of the page is used up."""

    def __init__(self, run: Path):
        self.run, self.free, self.left_out = run, _FIGURES, []

    def all(self, names) -> list[dict]:
        """``source``, ``alt``, ``caption`` and size of each figure that exists and fits."""
        return [figure for name in names if (figure := self._figure(name))]

    def parts(self, name: str, count: int) -> list[str]:
        """An image that holds ``count`` images side by side, cut up."""
        image = self._open(name) if count else None
        if image is None or image.width < count:
            return []
        side = image.width // count
        parts = [_webp(image.crop((i * side, 0, (i + 1) * side, image.height)), _STILL_WIDTH)
                 for i in range(count)]
        self.free -= sum(map(len, parts))
        return parts

    def _figure(self, name: str) -> dict | None:
        image = self._open(name)
        if image is None:
            return None
        source = _webp(image, _FIGURE_WIDTH)
        if len(source) > self.free:
            self.left_out.append(f"figures/{name}")
            return None
        self.free -= len(source)
        described = image.info.get("Description", "")
        caption = (f"{described} {HINTS.get(name, '')}".strip()
                   or name.removesuffix(".png").replace("_", " "))
        return {"source": source, "caption": caption, "width": image.width, "height": image.height,
                "alt": described or f"Figure: {caption}"}

    def _open(self, name: str) -> Image.Image | None:
        path = inside(self.run, Path("figures", name))
        if path is None:
            return None
        try:
            with Image.open(path, formats=["PNG"]) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise ValueError(f"more than {_MAX_PIXELS} pixels")
                return image.convert("RGB")  # keeps the text in it
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self.left_out.append(f"figures/{name} ({type(error).__name__})")
            return None

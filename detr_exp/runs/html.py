"""Pages that are complete in themselves: templates of this folder, filled and escaped, and images inside of them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def filled(template: str, /, **values: object) -> str:
    """A template of this folder as HTML; values are escaped."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("detr_exp.runs", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def jpeg_address(image: Image.Image, quality: int) -> str:
    """An image as a data address."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

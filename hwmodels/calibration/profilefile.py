"""How does a calibration get into a device profile, with everything else in it as it was?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hwmodels.efficiencyfile import calibration_block, kernels_block, yaml_text
from hwmodels.errors import ProfileError
from hwmodels.hardware import Device, load_device
from hwmodels.wholefile import whole_file
from hwmodels.yamlfiles import plain, read_mapping

#: The blocks that are written anew.
BLOCKS = ("efficiency", "calibration")
KEY = re.compile(r"^([A-Za-z_][\w-]*):", re.MULTILINE)


def profile_text(like: str, device: Device) -> str:
    """The text of a device profile: that of `like` with the coefficients, and the name, of `device`.

    like   the text of a profile; its estimates and all keys but `efficiency` and `calibration` stay, in their order
    """
    old = plain(like)
    efficiency: dict[str, Any] = dict(old.get("efficiency") or {})
    for name in ("kernels", "engines"):
        efficiency.pop(name, None)
    efficiency["kernels"] = kernels_block(device.efficiency.kernels)
    efficiency["engines"] = {name: kernels_block(k) for name, k in device.efficiency.engines.items()}
    text = without(without(like, "efficiency"), "calibration").rstrip("\n") + "\n"
    if old.get("name") != device.name:
        text = re.sub(r"^name:.*$", f"name: {device.name}", text, count=1, flags=re.MULTILINE)
    blocks = {"efficiency": efficiency, "calibration": calibration_block(device.calibration)}
    return text + yaml_text(blocks)


def without(text: str, key: str) -> str:
    """The text without the block of a top-level key.

    >>> without("a: 1\\nb:\\n  c: 2\\n  d: 3\\ne: 4\\n", "b")
    'a: 1\\ne: 4\\n'
    """
    starts = [found.start() for found in KEY.finditer(text)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        if text.startswith(f"{key}:", start):
            return text[:start] + text[end:]
    return text


def save_profile(text: str, path: Path) -> None:
    """Write a profile, whole or not at all, after reading it once as any command would.

    Raises ProfileError where it is no profile or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, ".yaml") as unfinished:
            unfinished.write_text(text, encoding="utf-8")
            read_mapping(unfinished)
            load_device(str(unfinished))
    except OSError as error:
        raise ProfileError(
            f"{path}: cannot be written ({error.strerror or error}); choose a file that can be written"
        ) from None

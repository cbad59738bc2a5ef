"""What a command prints: results and errors as the CNI specification wants them.

A previous result goes out as it came in, byte for byte: only where its version is not the
configuration's, which is how it was meant, the version is put right. The reference parses and
prints it anew and so loses what it does not know.
"""

from __future__ import annotations

import json

from cni.plugin.errors import PluginError
from cni.plugin.netconf import SUPPORTED_VERSIONS, PreviousResult
from cni.plugin.spans import read_members, skip_space

_NEWEST = SUPPORTED_VERSIONS[-1]


def add_result(previous: PreviousResult | None, version: str) -> str:
    """Give the result of ADD in the configuration's `version`."""
    if previous is None:
        return json.dumps({"cniVersion": version, "dns": {}})
    text = previous.text
    if previous.members.get("cniVersion") == version:
        return text
    if "cniVersion" in previous.members:
        span = read_members(text, 0)["cniVersion"]
        return f'{text[: span.start]}"{version}"{text[span.end :]}'
    comma = "" if text[skip_space(text, 1)] == "}" else ","
    return f'{{"cniVersion":"{version}"{comma}{text[1:]}'


def version_result() -> str:
    """Give the answer to VERSION."""
    return json.dumps({"cniVersion": _NEWEST, "supportedVersions": SUPPORTED_VERSIONS})


def error_result(error: PluginError, version: str) -> str:
    """Give the error object; the runtime hands message and details on to the kubelet."""
    parts: dict[str, object] = {
        "cniVersion": version,
        "code": int(error.code),
        "msg": error.message,
    }
    if error.details:
        parts["details"] = error.details
    return json.dumps(parts, indent=4)

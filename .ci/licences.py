"""Fails when a dependency's licence is not on our list. Reads `cargo metadata` from standard input."""

import json
import re
import sys

# Licences that let us ship a binary under MIT OR Apache-2.0. A new one is a decision: docs/decisions.md.
ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0",
    "CC0-1.0", "CDLA-Permissive-2.0", "ISC", "MIT", "MIT-0", "OpenSSL", "Unicode-3.0", "Unlicense", "Zlib",
}


def allowed(expression):
    """Evaluates an SPDX expression: OR wants one side allowed, AND both; AND binds tighter; old crates write / for OR."""
    words = re.findall(r"[()]|[\w.+-]+", expression.replace("/", " OR "))
    words = re.sub(r"\n(WITH)\n", r" \1 ", "\n".join(words)).split("\n")

    def either():
        result = both()
        while words and words[0] == "OR":
            words.pop(0)
            result = both() or result
        return result

    def both():
        result = one()
        while words and words[0] == "AND":
            words.pop(0)
            result = one() and result
        return result

    def one():
        word = words.pop(0)
        if word != "(":
            return word in ALLOWED
        result = either()
        assert words.pop(0) == ")", expression
        return result

    result = either()
    assert not words, expression
    return result


assert allowed("MIT OR GPL-3.0-only") and allowed("GPL-2.0/MIT") and not allowed("MIT AND GPL-3.0-only")
assert allowed("(Apache-2.0 OR MIT) AND Unicode-3.0") and not allowed("GPL-3.0-only AND (MIT OR ISC)")

packages = json.load(sys.stdin)["packages"]
bad = [p for p in packages if p["source"] and not (p["license"] and allowed(p["license"]))]
for package in bad:
    print(f"{package['name']} {package['version']}: licence {package['license']!r} is not on the list in .ci/licences.py")
print(f"{len(packages)} packages looked at")
sys.exit(1 if bad else 0)

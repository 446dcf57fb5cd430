"""``csrc/`` → C++ for the host: every ``asm(...)`` becomes calls of the emulated instructions (``machine/ptx.h``).

So the asm text itself is under test: operand order, registers, immediates. An instruction that ``ptx.h`` does not list, or a
construct that this file does not read, raises :class:`Untranslatable` with file and line. Everything else of the source is
left as it is, line for line, except CUDA's ways to say where memory lives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SUFFIXES", "Untranslatable", "translate", "translate_tree"]

#: Source files, and what the translation of each is called.
SUFFIXES = {".h": ".h", ".cuh": ".cuh", ".inc": ".inc", ".cu": ".cu.cpp", ".cpp": ".cpp"}

_PTX = Path(__file__).resolve().parent / "machine" / "ptx.h"
_C_TYPES = {"r": "uint32_t", "l": "uint64_t", "f": "float", "h": "uint16_t", "n": "int"}
_REGISTER_TYPES = {"pred": "bool", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t"}
#: Instructions that are plain C++: name → statement over their operands.
_PLAIN = {
    "mov.u32": "{0} = {1};", "mov.b32": "{0} = {1};", "mov.u64": "{0} = {1};", "mov.b64": "{0} = {1};",
    "setp.ne.b32": "{0} = ({1} != {2});",
}  # fmt: skip
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")


class Untranslatable(Exception):
    """What the translator does not know, as ``file:line: text``."""


def known_instructions() -> frozenset[str]:
    """Names of the functions that ``ptx.h`` declares."""
    return frozenset(re.findall(r"^(?:void|uint32_t) (\w+)\(", _PTX.read_text(), re.MULTILINE))


def function_name(instruction: str) -> str:
    """``mbarrier.init.shared::cta.b64`` → ``mbarrier_init_shared__cta_b64``."""
    return instruction.replace("::", "__").replace(".", "_")


# ------------------------------------------------------------------------------------------------ reading C++ text
def _skip_string(text: str, at: int) -> int:
    """Index after the string literal that starts at ``at``."""
    quote, at = text[at], at + 1
    while text[at] != quote:
        at += 2 if text[at] == "\\" else 1
    return at + 1


def split_outside(text: str, separator: str) -> list[str]:
    """``text`` split at a character, but not inside strings, brackets or a ``::`` between identifiers."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        char = text[at]
        if char == '"':
            at = _skip_string(text, at)
            continue
        depth += (char in "([{") - (char in ")]}")
        if char == separator == ":" and re.match(r"\w::\w", text[max(at - 1, 0) : at + 3]):
            at += 2
            continue
        if char == separator and depth == 0:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    return [*parts, text[start:]]


def _closing(text: str, at: int) -> int:
    """Index of the bracket that closes the one before ``at``."""
    depth = 1
    while True:
        if text[at] == '"':
            at = _skip_string(text, at)
            continue
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
        at += 1


def asm_statements(text: str) -> Iterator[tuple[int, int, str]]:
    """``(start, end, inside of the brackets)`` of every asm statement that is not in a comment."""
    at = 0
    for match in re.finditer(r"//[^\n]*|\basm\s*(?:volatile\b)?\s*\(", text):
        if match.start() < at or match.group().startswith("//"):
            continue
        close = _closing(text, match.end())
        at = text.index(";", close) + 1
        yield match.start(), at, text[match.end() : close]


# ------------------------------------------------------------------------------------------------ one asm statement
class _Asm:
    """Translates one asm statement; ``number`` makes its local names unique."""

    def __init__(self, body: str, number: int, known: frozenset[str]) -> None:
        self.number, self.known = number, known
        sections = split_outside(body, ":")
        literals = re.findall(r'"((?:[^"\\]|\\.)*)"', sections[0])
        self.template = "".join(literals).encode().decode("unicode_escape").strip()
        self.declarations: list[str] = []
        self.registers: dict[str, str] = {}
        self.operands: list[str] = []
        for section in sections[1:2]:
            for constraint, expression in self._constraints(section):
                if constraint[0] not in "=+":
                    raise Untranslatable(f"output constraint {constraint!r}")
                self.operands.append(f"({expression})")
        for section in sections[2:3]:
            for constraint, expression in self._constraints(section):
                if constraint not in _C_TYPES:
                    raise Untranslatable(f"input constraint {constraint!r}")
                name = f"in{len(self.operands)}_{number}"
                self.declarations.append(
                    f"const {_C_TYPES[constraint]} {name} = ({_C_TYPES[constraint]})({expression});"
                )
                self.operands.append(name)

    @staticmethod
    def _constraints(section: str) -> Iterator[tuple[str, str]]:
        for item in split_outside(section, ",") if section.strip() else []:
            match = re.fullmatch(r'\s*"([^"]*)"\s*\((.*)\)\s*', item, re.DOTALL)
            if match is None:
                raise Untranslatable(f"asm operand {item.strip()!r}")
            yield match.group(1), match.group(2)

    def _statements(self) -> Iterator[tuple[str, str]]:
        """``("label", name)`` and ``("op", text)``, in order."""
        text = self.template
        if text.startswith("{"):  # a scope of its own
            text = text[1 : text.rindex("}")]
        for line in re.split(r"[;\n]", text):
            rest = line.strip()
            while match := re.match(r"(\w+):(?!:)\s*", rest):
                yield "label", match.group(1)
                rest = rest[match.end() :]
            if rest:
                yield "op", rest

    def _operand(self, token: str) -> list[str]:
        """C++ expressions of a PTX operand; brackets and braces are flattened, ``_`` is nothing."""
        token = token.strip()
        if token == "_":
            return []
        if re.fullmatch(r"%\d+", token):
            return [self.operands[int(token[1:])]]
        if token.startswith("%%"):
            special = f"special_{token[2:]}"
            if special not in self.known:
                raise Untranslatable(f"special register {token[1:]!r}")
            return [f"emu::ptx::{special}()"]
        if token[:1] + token[-1:] in ("[]", "{}"):
            return [name for inner in split_outside(token[1:-1], ",") for name in self._operand(inner)]
        if re.fullmatch(r"-?\d+(\.\d+)?", token):
            return [token]
        if token in self.registers:
            return [f"{token}_{self.number}"]
        raise Untranslatable(f"asm operand {token!r}")

    def _instruction(self, text: str) -> str:
        if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text):
            kind, names = match.groups()
            if kind not in _REGISTER_TYPES:
                raise Untranslatable(f"register type .{kind}")
            for name in (n.strip() for n in names.split(",")):
                self.registers[name] = _REGISTER_TYPES[kind]
                self.declarations.append(f"{_REGISTER_TYPES[kind]} {name}_{self.number}{{}};")
            return ""
        if match := re.fullmatch(r"@(!?)(\w+)\s+bra\s+(\w+)", text):
            negated, predicate, label = match.groups()
            return f"if ({negated}{self._operand(predicate)[0]}) goto {label}_{self.number};"
        name, _, rest = text.partition(" ")
        tokens = split_outside(rest, ",") if rest.strip() else []
        arguments = [self._operand(token) for token in tokens]
        if match := _WGMMA.fullmatch(name):
            columns, (d, *others) = int(match.group(1)), arguments
            if len(d) != columns // 2:
                raise Untranslatable(f"{name} with {len(d)} accumulators instead of {columns // 2}")
            registers = ", ".join(f"&{r}" for r in d)
            flat = ", ".join(a for group in others for a in group)
            bf16 = "true" if match.group(2) == "bf16" else "false"
            return (
                f"{{ float* const d_{self.number}[] = {{{registers}}}; "
                f"emu::ptx::wgmma_mma_async(d_{self.number}, {columns}, {bf16}, {flat}); }}"
            )
        if name == "mov.b32" and len(arguments[0]) == 2:  # halves of a register
            (low, high), (whole,) = arguments
            return f"{low} = uint16_t({whole}); {high} = uint16_t(uint32_t({whole}) >> 16);"
        flat_arguments = [a for group in arguments for a in group]
        if name in _PLAIN:
            return _PLAIN[name].format(*flat_arguments)
        if function_name(name) not in self.known:
            raise Untranslatable(f"the emulator does not know the instruction {name!r} (tools/emulator/machine/ptx.h)")
        return f"emu::ptx::{function_name(name)}({', '.join(flat_arguments)});"

    def code(self) -> str:
        if not self.template:  # a fence for the compiler
            return ";"
        lines = [
            f"{text}_{self.number}:" if kind == "label" else self._instruction(text)
            for kind, text in self._statements()
        ]
        return "{ " + " ".join([*self.declarations, *filter(None, lines)]) + " }"


# ------------------------------------------------------------------------------------------------ files
_KERNEL = re.compile(
    r"__global__\s+void\s+__launch_bounds__\(((?:[^()]|\([^()]*\))*)\)\s*(\w+)\(\s*const\s+__grid_constant__\s+(\w+)\s+(\w+)\s*\)\s*\{"
)


def _places_of_memory(text: str) -> str:
    """Kernel parameters, dynamic and static shared memory."""
    text = _KERNEL.sub(
        r"__global__ void \2(const \3& \4) { if (::emu::only_asked(sizeof(\3), \1)) return;", text
    )  # fmt: skip
    text = re.sub(r"extern __shared__ uint8_t (\w+)\[\];", r"uint8_t* const \1 = ::emu::dynamic_smem();", text)
    return re.sub(
        r"__shared__ (\w+) (\w+)((?:\[[^\[\];]*\])+);",
        r"using \2_type = \1\3; \2_type& \2 = ::emu::static_smem<\2_type>();",
        text,
    )


def translate(text: str, name: str, known: frozenset[str] | None = None) -> str:
    """One source file. ``name`` is what compilers and errors call it. Raises :class:`Untranslatable`."""
    known = known_instructions() if known is None else known
    out, at = [f'#line 1 "{name}"\n'], 0
    for number, (start, end, body) in enumerate(asm_statements(text)):
        line = text.count("\n", 0, start) + 1
        try:
            code = _Asm(body, number, known).code()
        except Untranslatable as error:
            raise Untranslatable(f"{name}:{line}: {error}") from None
        out += [
            text[at:start],
            code.replace("\n", " "),
            "\n" * text.count("\n", start, end),
        ]  # lines keep their numbers
        at = end
    translated = _places_of_memory("".join([*out, text[at:]]))
    # Under a name of its own the module can lie, and be imported, beside the real one.
    translated = re.sub(r"\bPYBIND11_MODULE\((\w+),", r"PYBIND11_MODULE(\1_emulated,", translated)
    for left in ("__shared__", "__grid_constant__", "__global__ void __launch_bounds__"):
        if match := re.search(rf"^(?!\s*//)[^\n]*{re.escape(left)}", translated, re.MULTILINE):
            line = translated.count("\n", 0, match.start())
            raise Untranslatable(f"{name}:{line}: a use of {left.split()[-1]} that the emulator does not read")
    return translated


def translate_tree(source: Path, target: Path) -> list[Path]:
    """Translate ``csrc/``; writes only what changed. Returns the files of the translation."""
    known, files = known_instructions(), []
    for file in sorted(source.rglob("*")):
        if file.suffix not in SUFFIXES:
            continue
        relative = file.relative_to(source)
        out = (target / relative).with_suffix(SUFFIXES[file.suffix])
        new = translate(file.read_text(), f"csrc/{relative}", known)
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists() or out.read_text() != new:
            out.write_text(new)
        files.append(out)
    for stale in set(target.rglob("*.*")) - set(files):
        stale.unlink()
    return files

"""The mapping from folders to packages, and the optional C++ extension. The metadata is in pyproject.toml."""

import hashlib
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDERS = {"peakgpt": "api", "peakgpt.kernels": "kernels", "peakgpt.engine": "engine", "peakgpt.bench": "bench"}
PACKAGES = [
    package
    for name, folder in FOLDERS.items()
    for package in (name, *(f"{name}.{sub}" for sub in find_packages(folder)))
]
EDITABLE = Path("build", "editable")
SOURCES = sorted(map(str, Path("csrc").rglob("*.cpp")))
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
# No -march: a kernel names its instruction set and is chosen at run time. No -ffast-math: masking needs NaN and -inf.
# -ffp-contract=off: only Fma in the source fuses a product and a sum. A compiler fuses a loop and its tail differently,
# which made the bits depend on the number of threads (seen in AdamW on aarch64).
FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off",
    "-Wall", "-Wextra",
]  # fmt: skip
# Variable and default. Not the flags of sysconfig, which are for the machine that built Python.
ENVIRONMENT = (("CXX", "c++"), ("CXXFLAGS", ""), ("LDFLAGS", ""))
NINJA = """\
builddir = {folder}
rule cxx
  command = {cxx} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {link} $in -o $out
build {folder}/_C.so: link {objects}
"""


class BuildExt(build_ext):
    """Compile with ninja: changed files and files that include a changed header. Without ninja, compile all files."""

    def build_extension(self, ext: Extension) -> None:
        # Not setuptools' folder, which an editable install deletes. One per Python, since each has its own headers.
        folder = f"build/{sysconfig.get_config_var('SOABI')}"
        os.makedirs(folder, exist_ok=True)
        sources = [*ext.sources, write_digest(folder)]
        try:
            import ninja
        except ImportError:
            from pybind11.setup_helpers import ParallelCompile

            ext.sources = sources
            with ParallelCompile():
                return super().build_extension(ext)

        objects = {source: f"{folder}/{Path(source).with_suffix('.o')}" for source in sources}
        include = [f"-I{path}" for path in (*ext.include_dirs, *self.include_dirs)]
        cxx, cxxflags, ldflags = (shlex.split(os.environ.get(*v)) for v in ENVIRONMENT)
        text = NINJA.format(
            folder=folder,
            cxx=shlex.join([*cxx, "-fPIC", *FLAGS, *include, *cxxflags]).replace("$", "$$"),
            link=shlex.join([*cxx, "-shared", "-fopenmp", *ldflags]).replace("$", "$$"),
            objects=" ".join(objects.values()),
        )
        text += "".join(f"build {out}: cxx {source}\n" for source, out in objects.items())
        Path(folder, "build.ninja").write_text(text)
        if subprocess.call([os.path.join(ninja.BIN_DIR, "ninja"), "-f", f"{folder}/build.ninja"]):
            raise CompileError("the C++ extension did not compile; the message of the compiler is above")
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        self.copy_file(f"{folder}/_C.so", target)


def write_digest(folder: str) -> str:
    """Write the SHA-256 of csrc to a separate C++ file, so that no other file is recompiled for it. Return its path."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(map(Path, SOURCES + HEADERS)))).hexdigest()
    path = Path(folder, "source_digest.cpp")
    text = f'namespace peak {{\nextern const char kSourceDigest[];\nconst char kSourceDigest[] = "{digest}";\n}}\n'
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path)


def package_dir() -> dict[str, str]:
    """Return the folder of each package, or in an editable install one folder of links for all of them.

    One folder needs only a path file. For several folders setuptools installs an import hook, which no type checker can
    follow.
    """
    if "editable_wheel" not in sys.argv:
        return FOLDERS
    package = EDITABLE / "peakgpt"
    package.mkdir(parents=True, exist_ok=True)
    for path in package.iterdir():
        if path.is_symlink():
            path.unlink()
    for path in (*Path("api").iterdir(), *(Path(name) for name in FOLDERS.values() if name != "api")):
        if path.suffix != ".so" and path.name != "__pycache__":
            (package / path.name).symlink_to(os.path.relpath(path, package))
    return {"": str(EDITABLE)}


def extension() -> list[Extension]:
    """Return `peakgpt._C`, or an empty list without pybind11. The build may fail unless PEAKGPT_REQUIRE_EXT=1."""
    required = os.environ.get("PEAKGPT_REQUIRE_EXT") == "1"
    try:
        import pybind11
    except ImportError:
        if required:
            raise
        return []
    include = ["csrc", pybind11.get_include()]
    return [
        Extension(
            "peakgpt._C",
            SOURCES,
            include_dirs=include,
            depends=HEADERS,
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=not required,
        )
    ]


setup(packages=PACKAGES, package_dir=package_dir(), ext_modules=extension(), cmdclass={"build_ext": BuildExt})

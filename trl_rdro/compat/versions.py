"""Which releases of TRL and transformers work: said in a sentence, before a name that moved is missed somewhere."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


# As in pyproject.toml
SUPPORTED = {"trl": ">=1.16,<1.17", "transformers": ">=5.23,<6"}


def require_supported_versions() -> None:
    """
    Raises:
        `ImportError`: for a release of TRL or transformers that is not supported. A package that is not installed is
            left to the import that misses it: the losses alone need neither.
    """
    for package, supported in SUPPORTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not SpecifierSet(supported).contains(installed, prereleases=True):
            raise ImportError(
                f"trl_rdro works with {package}{supported}, and {package} {installed} is installed: "
                f"pip install '{package}{supported}'."
            )

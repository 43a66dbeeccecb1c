"""Everything about the package stands in `settings.ini`; this file hands it to setuptools."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class WithResults(build_py):
    "The stored runs travel with the package, so that `minbert table` and `minbert claim` find them."

    def run(self):
        super().run()
        if not self.editable_mode:
            place = Path(self.build_lib, "minbert", "results")
            self.mkpath(str(place))
            for path in sorted(Path("nbs/results").glob("*.json")):
                self.copy_file(str(path), str(place / path.name))


def readme():
    "The README with whole addresses, since a package index shows it without the files beside it."
    if not Path("README.md").exists():
        return cfg["description"]
    raw = cfg["git_url"].replace("github.com", "raw.githubusercontent.com")

    def whole(link):
        place = f"{raw}/{cfg['branch']}" if link[1].endswith(".png") else f"{cfg['git_url']}/blob/{cfg['branch']}"
        return f"]({place}/{link[1]})"
    return re.sub(r"\]\((?!\w+:|#)([^)]+)\)", whole, Path("README.md").read_text(encoding="utf-8"))


parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    url=cfg["git_url"],
    packages=find_packages(include=["minbert", "minbert.*"]),
    include_package_data=True,
    cmdclass={"build_py": WithResults},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "check": ["hypothesis>=6"],
        "cluster": ["dask[distributed]"],
        "dev": cfg["dev_requirements"].split(),
        "tensorboard": ["tensorboard>=2.14"],
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": ["minbert=minbert._modidx:d"],
    },
    zip_safe=False,
)

"Packaging: everything is read from settings.ini."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="], interpolation=None)
config.read("settings.ini", encoding="utf-8")
about = config["DEFAULT"]


class BuildWithNotebooks(build_py):
    "The phases are notebooks: an installed package brings them along, in codetrace/nbs/phases/."

    def run(self):
        super().run()
        if not self.editable_mode:
            for path in sorted(Path("nbs/phases").glob("*.ipynb")):
                self.mkpath(f"{self.build_lib}/codetrace/nbs/phases")
                self.copy_file(str(path), f"{self.build_lib}/codetrace/nbs/phases/{path.name}")


setup(
    name=about["lib_name"],
    version=about["version"],
    description=about["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=about["author"],
    license="Apache-2.0",
    keywords=about["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    url=about["git_url"].replace("%(user)s", about["user"]).replace("%(repo)s", about["repo"]),
    python_requires=f">={about['min_python']}",
    packages=find_packages(include=["codetrace", "codetrace.*"]),
    package_data={"codetrace": ["data/**/*"]},
    cmdclass={"build_py": BuildWithNotebooks},
    install_requires=about["requirements"].split(),
    extras_require={
        name: about[f"{name}_requirements"].split()
        for name in ("dev", "s3", "vllm", "quant", "saes", "lens", "pdf", "app", "browser")
    },
    entry_points={"console_scripts": about["console_scripts"].split(), "nbdev": ["codetrace=codetrace._modidx:d"]},
    zip_safe=False,
)

"Packaging: everything is read from settings.ini."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="], interpolation=None)
config.read("settings.ini", encoding="utf-8")
about = config["DEFAULT"]
git_url = about["git_url"].replace("%(user)s", about["user"]).replace("%(repo)s", about["repo"])


class BuildWithNotebooks(build_py):
    "The phases are notebooks: an installed package brings them along, in codetrace/nbs/phases/, and the recipes beside them."

    def run(self):
        super().run()
        if not self.editable_mode:
            for path in sorted([*Path("nbs/phases").glob("*.ipynb"), *Path("recipes").rglob("*.yaml")]):
                self.mkpath(f"{self.build_lib}/codetrace/{path.parent}")
                self.copy_file(str(path), f"{self.build_lib}/codetrace/{path}")


def readme_with_whole_links(git_url: str) -> str:
    "The README for an index of packages, where links to files of the repository lead nowhere."
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^]]*)\]\((?!https?:)([^)]+)\)", rf"![\1]({git_url}/raw/main/\2)", text)
    return re.sub(r"(?<!!)\[([^]]*)\]\((?!https?:|#)([^)]+)\)", rf"[\1]({git_url}/blob/main/\2)", text)


setup(
    name=about["lib_name"],
    version=about["version"],
    description=about["description"],
    long_description=readme_with_whole_links(git_url),
    long_description_content_type="text/markdown",
    author=about["author"],
    license="Apache-2.0",
    keywords=about["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Framework :: Jupyter",
        "Topic :: Software Development :: Testing",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    url=git_url,
    project_urls={
        "Source": git_url,
        "Recipes": f"{git_url}/blob/main/nbs/recipes.ipynb",
        "Issues": f"{git_url}/issues",
    },
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

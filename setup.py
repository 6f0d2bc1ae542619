"Package description, read from settings.ini (the one place where names and versions stand)."
import configparser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
# onnxruntime-gpu has no macOS wheel
onnxruntime = ['onnxruntime-gpu>=1.20; sys_platform != "darwin"', 'onnxruntime>=1.20; sys_platform == "darwin"']

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    packages=find_packages(include=["pillsnap", "pillsnap.*"]),
    package_data={"pillsnap": ["static/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split() + onnxruntime,
    extras_require={"train": cfg["train_requirements"].split(), "dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": [cfg["console_scripts"]]},
)

"""What to cite: BibTeX of the methods that a normalizer is made of."""

from collections.abc import Callable
from typing import Any

from jaxbn._factory import Made
from jaxbn._normalizer import Normalizer

_BATCH_NORM = "ioffe2015batch"

# Keys of the works behind each factory, by its name; those that an argument brings in are in `_by_argument`.
_WORKS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "recordable": (),
    "batch_norm": (_BATCH_NORM,),
    "batch_renorm": (_BATCH_NORM, "ioffe2017batch"),
    "ghost_batch_norm": (_BATCH_NORM, "hoffer2017train"),
    "virtual_batch_norm": (_BATCH_NORM, "salimans2016improved"),
    "whitening_norm": ("huang2018decorrelated",),
    "conditional_batch_norm": (_BATCH_NORM,),
    "split_batch_norm": (_BATCH_NORM, "xie2020adversarial"),
    "stochastic_batch_norm": (_BATCH_NORM, "teye2018bayesian"),
    "mean_only_batch_norm": (_BATCH_NORM, "salimans2016weight"),
    "recurrent_batch_norm": (_BATCH_NORM, "cooijmans2017recurrent"),
    "batch_norm_lstm": (_BATCH_NORM, "cooijmans2017recurrent"),
    "layer_norm": ("ba2016layer",),
    "instance_norm": ("ulyanov2016instance",),
    "group_norm": ("wu2018group",),
    "rms_norm": ("zhang2019root",),
    "filter_response_norm": ("singh2020filter",),
    "graph_norm": ("cai2021graphnorm",),
    "running_norm": ("welford1962note", "andrychowicz2021matters"),
    "noisy": ("santurkar2018does",),
    "frozen": (),
}

# (kind, authors, title, where it appeared, year) by key.
_ENTRIES: dict[str, tuple[str, str, str, dict[str, str], int]] = {
    _BATCH_NORM: (
        "inproceedings",
        "Ioffe, Sergey and Szegedy, Christian",
        "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
        {"booktitle": "International Conference on Machine Learning", "pages": "448--456"},
        2015,
    ),
    "ioffe2017batch": (
        "inproceedings",
        "Ioffe, Sergey",
        "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        {"booktitle": "Advances in Neural Information Processing Systems", "volume": "30"},
        2017,
    ),
    "bhatt2024crossq": (
        "inproceedings",
        "Bhatt, Aditya and Palenicek, Daniel and Belousov, Boris and Argus, Max and Amiranashvili, Artemij and"
        " Brox, Thomas and Peters, Jan",
        "{CrossQ}: Batch Normalization in Deep Reinforcement Learning for Greater Sample Efficiency and Simplicity",
        {"booktitle": "International Conference on Learning Representations"},
        2024,
    ),
    "hoffer2017train": (
        "inproceedings",
        "Hoffer, Elad and Hubara, Itay and Soudry, Daniel",
        "Train longer, generalize better: closing the generalization gap in large batch training of neural networks",
        {"booktitle": "Advances in Neural Information Processing Systems", "volume": "30"},
        2017,
    ),
    "salimans2016improved": (
        "inproceedings",
        "Salimans, Tim and Goodfellow, Ian and Zaremba, Wojciech and Cheung, Vicki and Radford, Alec and Chen, Xi",
        "Improved Techniques for Training {GANs}",
        {"booktitle": "Advances in Neural Information Processing Systems", "volume": "29"},
        2016,
    ),
    "huang2018decorrelated": (
        "inproceedings",
        "Huang, Lei and Yang, Dawei and Lang, Bo and Deng, Jia",
        "Decorrelated Batch Normalization",
        {"booktitle": "{IEEE/CVF} Conference on Computer Vision and Pattern Recognition", "pages": "791--800"},
        2018,
    ),
    "huang2019iterative": (
        "inproceedings",
        "Huang, Lei and Zhou, Yi and Zhu, Fan and Liu, Li and Shao, Ling",
        "Iterative Normalization: Beyond Standardization towards Efficient Whitening",
        {"booktitle": "{IEEE/CVF} Conference on Computer Vision and Pattern Recognition", "pages": "4874--4883"},
        2019,
    ),
    "dumoulin2017learned": (
        "inproceedings",
        "Dumoulin, Vincent and Shlens, Jonathon and Kudlur, Manjunath",
        "A Learned Representation for Artistic Style",
        {"booktitle": "International Conference on Learning Representations"},
        2017,
    ),
    "devries2017modulating": (
        "inproceedings",
        "de Vries, Harm and Strub, Florian and Mary, J{\\'e}r{\\'e}mie and Larochelle, Hugo and Pietquin, Olivier and"
        " Courville, Aaron",
        "Modulating early visual processing by language",
        {"booktitle": "Advances in Neural Information Processing Systems", "volume": "30"},
        2017,
    ),
    "xie2020adversarial": (
        "inproceedings",
        "Xie, Cihang and Tan, Mingxing and Gong, Boqing and Wang, Jiang and Yuille, Alan L. and Le, Quoc V.",
        "Adversarial Examples Improve Image Recognition",
        {"booktitle": "{IEEE/CVF} Conference on Computer Vision and Pattern Recognition", "pages": "819--828"},
        2020,
    ),
    "teye2018bayesian": (
        "inproceedings",
        "Teye, Mattias and Azizpour, Hossein and Smith, Kevin",
        "{Bayesian} Uncertainty Estimation for Batch Normalized Deep Networks",
        {"booktitle": "International Conference on Machine Learning", "pages": "4907--4916"},
        2018,
    ),
    "salimans2016weight": (
        "inproceedings",
        "Salimans, Tim and Kingma, Diederik P.",
        "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks",
        {"booktitle": "Advances in Neural Information Processing Systems", "volume": "29"},
        2016,
    ),
    "cooijmans2017recurrent": (
        "inproceedings",
        "Cooijmans, Tim and Ballas, Nicolas and Laurent, C{\\'e}sar and G{\\\"u}l{\\c{c}}ehre, {\\c{C}}a{\\u{g}}lar and"
        " Courville, Aaron",
        "Recurrent Batch Normalization",
        {"booktitle": "International Conference on Learning Representations"},
        2017,
    ),
    "ba2016layer": (
        "misc",
        "Ba, Jimmy Lei and Kiros, Jamie Ryan and Hinton, Geoffrey E.",
        "Layer Normalization",
        {"eprint": "1607.06450", "archiveprefix": "arXiv"},
        2016,
    ),
    "ulyanov2016instance": (
        "misc",
        "Ulyanov, Dmitry and Vedaldi, Andrea and Lempitsky, Victor",
        "Instance Normalization: The Missing Ingredient for Fast Stylization",
        {"eprint": "1607.08022", "archiveprefix": "arXiv"},
        2016,
    ),
    "wu2018group": (
        "inproceedings",
        "Wu, Yuxin and He, Kaiming",
        "Group Normalization",
        {"booktitle": "European Conference on Computer Vision", "pages": "3--19"},
        2018,
    ),
    "zhang2019root": (
        "inproceedings",
        "Zhang, Biao and Sennrich, Rico",
        "Root Mean Square Layer Normalization",
        {"booktitle": "Advances in Neural Information Processing Systems", "volume": "32"},
        2019,
    ),
    "singh2020filter": (
        "inproceedings",
        "Singh, Saurabh and Krishnan, Shankar",
        "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural Networks",
        {"booktitle": "{IEEE/CVF} Conference on Computer Vision and Pattern Recognition", "pages": "11237--11246"},
        2020,
    ),
    "cai2021graphnorm": (
        "inproceedings",
        "Cai, Tianle and Luo, Shengjie and Xu, Keyulu and He, Di and Liu, Tie-Yan and Wang, Liwei",
        "{GraphNorm}: A Principled Approach to Accelerating Graph Neural Network Training",
        {"booktitle": "International Conference on Machine Learning"},
        2021,
    ),
    "welford1962note": (
        "article",
        "Welford, B. P.",
        "Note on a Method for Calculating Corrected Sums of Squares and Products",
        {"journal": "Technometrics", "volume": "4", "number": "3", "pages": "419--420"},
        1962,
    ),
    "andrychowicz2021matters": (
        "inproceedings",
        "Andrychowicz, Marcin and Raichuk, Anton and Sta{\\'n}czyk, Piotr and Orsini, Manu and Girgin, Sertan and"
        " Marinier, Rapha{\\\"e}l and Hussenot, L{\\'e}onard and Geist, Matthieu and Pietquin, Olivier and"
        " Michalski, Marcin and Gelly, Sylvain and Bachem, Olivier",
        "What Matters for On-Policy Deep Actor-Critic Methods? A Large-Scale Study",
        {"booktitle": "International Conference on Learning Representations"},
        2021,
    ),
    "he2020momentum": (
        "inproceedings",
        "He, Kaiming and Fan, Haoqi and Wu, Yuxin and Xie, Saining and Girshick, Ross",
        "Momentum Contrast for Unsupervised Visual Representation Learning",
        {"booktitle": "{IEEE/CVF} Conference on Computer Vision and Pattern Recognition", "pages": "9729--9738"},
        2020,
    ),
    "santurkar2018does": (
        "inproceedings",
        "Santurkar, Shibani and Tsipras, Dimitris and Ilyas, Andrew and Madry, Aleksander",
        "How Does Batch Normalization Help Optimization?",
        {"booktitle": "Advances in Neural Information Processing Systems", "volume": "31"},
        2018,
    ),
}


def citation(*norms: Normalizer) -> str:
    """BibTeX of the methods that normalizers use, each work once, in the order in which they are met.

        print(jaxbn.citation(jaxbn.batch_norm(), jaxbn.group_norm(8)))

    A normalizer around another, such as `frozen`, brings in the works of both; so do arguments that are a method of
    their own, such as the `group_size` of ghost batches.

    Args:
      *norms: as the factories of jaxbn make them. A factory of your own may have an attribute `bibtex`, a string.

    Returns:
      Entries with an empty line between them; "" where there is nothing to cite.

    Raises:
      TypeError: one that is not made by a factory, or by a factory of which nothing is known.
    """
    entries: dict[str, str] = {}
    for norm in norms:
        for key, entry in _entries_of(norm):
            entries.setdefault(key, entry)
    return "\n\n".join(entries.values())


def _entries_of(norm: Any) -> list[tuple[str, str]]:
    origin = getattr(norm, "_origin", None)
    if not isinstance(norm, Made) or origin is None:
        raise TypeError(
            f"{norm!r} was not made by a factory, so that nothing is known of it; expected a Normalizer such as"
            " jaxbn.batch_norm(). Decorate a factory of your own with jaxbn.normalizer_factory."
        )
    inner = [entry for value in origin.passed.values() if isinstance(value, Made) for entry in _entries_of(value)]
    own = getattr(origin.factory, "bibtex", None)
    if own is not None:
        return [*inner, (own, own.strip())]
    if not _is_ours(origin.factory):
        raise TypeError(f"{norm!r} comes from a factory of which nothing is known; give it an attribute `bibtex`.")
    keys = [*_WORKS[origin.factory.__name__], *_by_argument(origin.factory.__name__, origin.passed)]
    return [*inner, *((key, _formatted(key)) for key in keys)]


def _is_ours(factory: Callable[..., Any]) -> bool:
    return factory.__module__.startswith("jaxbn.") and factory.__name__ in _WORKS


def _by_argument(name: str, passed: dict[str, Any]) -> list[str]:
    """Keys of works that an argument stands for."""
    keys = []
    if "batch_norm" in name and passed.get("group_size") is not None:
        keys.append("hoffer2017train")
    if passed.get("shuffle"):
        keys.append("he2020momentum")
    if name == "batch_renorm" and passed.get("warmup_steps"):
        keys.append("bhatt2024crossq")
    if name == "conditional_batch_norm":
        keys.append("devries2017modulating" if passed.get("condition_size") is not None else "dumoulin2017learned")
    if getattr(passed.get("inverse_root"), "__name__", "") == "newton_inverse_square_root":
        keys.append("huang2019iterative")
    return keys


def _formatted(key: str) -> str:
    kind, authors, title, where, year = _ENTRIES[key]
    fields = {"author": authors, "title": title, **where, "year": str(year)}
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])

"""The paper behind each loss, in the form TRL's model cards take (`title`, arXiv `id`, `citation`)."""

import textwrap


def _paper(title: str, arxiv_id: str, citation: str) -> dict[str, str]:
    return {"title": title, "id": arxiv_id, "citation": textwrap.dedent(citation).strip()}


DDRO = _paper(
    "Direct Density Ratio Optimization: A Statistically Consistent Approach to Aligning Large Language Models",
    "2505.07558",
    """
    @inproceedings{higuchi2025direct,
        title     = {{Direct Density Ratio Optimization: A Statistically Consistent Approach to Aligning Large Language Models}},
        author    = {Rei Higuchi and Taiji Suzuki},
        year      = 2025,
        booktitle = {International Conference on Machine Learning},
        eprint    = {2505.07558},
    }""",
)
RDRO = _paper(
    "Relative Density Ratio Optimization for Stable and Statistically Consistent Model Alignment",
    "2604.04410",
    """
    @article{takahashi2026relative,
        title   = {{Relative Density Ratio Optimization for Stable and Statistically Consistent Model Alignment}},
        author  = {Hiroshi Takahashi and Tomoharu Iwata and Atsutoshi Kumagai and Sekitoshi Kanai and Masanori Yamada and Kosuke Nishida and Kazutoshi Shinoda},
        year    = 2026,
        eprint  = {2604.04410},
        journal = {arXiv preprint arXiv:2604.04410},
    }""",
)
ROBUST = _paper(
    "Robust LLM Alignment via Distributionally Robust Direct Preference Optimization",
    "2502.01930",
    """
    @inproceedings{xu2025robust,
        title     = {{Robust LLM Alignment via Distributionally Robust Direct Preference Optimization}},
        author    = {Zaiyan Xu and Sushil Vemuri and Kishan Panaganti and Dileep Kalathil and Rahul Jain and Deepak Ramachandran},
        year      = 2025,
        booktitle = {Advances in Neural Information Processing Systems 38},
        eprint    = {2502.01930},
    }""",
)

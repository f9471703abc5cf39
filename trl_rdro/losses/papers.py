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
DPO = _paper(
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "2305.18290",
    """
    @inproceedings{rafailov2023direct,
        title     = {{Direct Preference Optimization: Your Language Model is Secretly a Reward Model}},
        author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and Christopher D. Manning and Chelsea Finn},
        year      = 2023,
        booktitle = {Advances in Neural Information Processing Systems 36},
        eprint    = {2305.18290},
    }""",
)
DRDPO = _paper(
    "Towards Robust Alignment of Language Models: Distributionally Robustifying Direct Preference Optimization",
    "2407.07880",
    """
    @article{wu2024towards,
        title   = {{Towards Robust Alignment of Language Models: Distributionally Robustifying Direct Preference Optimization}},
        author  = {Junkang Wu and Yuexiang Xie and Zhengyi Yang and Jiancan Wu and Jiawei Chen and Jinyang Gao and Bolin Ding and Xiang Wang and Xiangnan He},
        year    = 2024,
        eprint  = {2407.07880},
        journal = {arXiv preprint arXiv:2407.07880},
    }""",
)
GRDPO = _paper(
    "Group Robust Preference Optimization in Reward-free RLHF",
    "2405.20304",
    """
    @inproceedings{ramesh2024group,
        title     = {{Group Robust Preference Optimization in Reward-free RLHF}},
        author    = {Shyam Sundhar Ramesh and Yifan Hu and Iason Chaimalas and Viraj Mehta and Pier Giuseppe Sessa and Haitham Bou Ammar and Ilija Bogunovic},
        year      = 2024,
        booktitle = {Advances in Neural Information Processing Systems 37},
        eprint    = {2405.20304},
    }""",
)
HOLDER = _paper(
    "Scalable Valuation of Human Feedback through Provably Robust Model Alignment",
    "2505.17859",
    """
    @article{fujisawa2025scalable,
        title   = {{Scalable Valuation of Human Feedback through Provably Robust Model Alignment}},
        author  = {Masahiro Fujisawa and Masaki Adachi and Michael A. Osborne},
        year    = 2025,
        eprint  = {2505.17859},
        journal = {arXiv preprint arXiv:2505.17859},
    }""",
)
ROPO = _paper(
    "ROPO: Robust Preference Optimization for Large Language Models",
    "2404.04102",
    """
    @inproceedings{liang2025ropo,
        title     = {{ROPO: Robust Preference Optimization for Large Language Models}},
        author    = {Xize Liang and Chao Chen and Shuang Qiu and Jie Wang and Yue Wu and Zhihang Fu and Hanzhu Chen and Feng Wu and Jieping Ye},
        year      = 2025,
        booktitle = {International Conference on Machine Learning},
        eprint    = {2404.04102},
    }""",
)
REPO = _paper(
    "RE-PO: Robust Enhanced Policy Optimization as a General Framework for LLM Alignment",
    "2509.24159",
    """
    @inproceedings{cao2026repo,
        title     = {{RE-PO: Robust Enhanced Policy Optimization as a General Framework for LLM Alignment}},
        author    = {Xiaoyang Cao and Zelai Xu and Mo Guang and Kaiwen Long and Michiel A. Bakker and Yu Wang and Chao Yu},
        year      = 2026,
        booktitle = {International Conference on Learning Representations},
        eprint    = {2509.24159},
    }""",
)
CHIPO = _paper(
    "Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via Chi-Squared Preference Optimization",
    "2407.13399",
    """
    @article{huang2024correcting,
        title   = {{Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via Chi-Squared Preference Optimization}},
        author  = {Audrey Huang and Wenhao Zhan and Tengyang Xie and Jason D. Lee and Wen Sun and Akshay Krishnamurthy and Dylan J. Foster},
        year    = 2024,
        eprint  = {2407.13399},
        journal = {arXiv preprint arXiv:2407.13399},
    }""",
)
DPOP = _paper(
    "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
    "2402.13228",
    """
    @article{pal2024smaug,
        title   = {{Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive}},
        author  = {Arka Pal and Deep Karkhanis and Samuel Dooley and Manley Roberts and Siddartha Naidu and Colin White},
        year    = 2024,
        eprint  = {2402.13228},
        journal = {arXiv preprint arXiv:2402.13228},
    }""",
)
ADADPO = _paper(
    "Adaptive Preference Scaling for Reinforcement Learning with Human Feedback",
    "2406.02764",
    """
    @inproceedings{hong2024adaptive,
        title     = {{Adaptive Preference Scaling for Reinforcement Learning with Human Feedback}},
        author    = {Ilgee Hong and Zichong Li and Alexander Bukharin and Yixiao Li and Haoming Jiang and Tianbao Yang and Tuo Zhao},
        year      = 2024,
        booktitle = {Advances in Neural Information Processing Systems 37},
        eprint    = {2406.02764},
    }""",
)
GDPO = _paper(
    "Geometric-Averaged Preference Optimization for Soft Preference Labels",
    "2409.06691",
    """
    @inproceedings{furuta2024geometric,
        title     = {{Geometric-Averaged Preference Optimization for Soft Preference Labels}},
        author    = {Hiroki Furuta and Kuang-Huei Lee and Shixiang Shane Gu and Yutaka Matsuo and Aleksandra Faust and Heiga Zen and Izzeddin Gur},
        year      = 2024,
        booktitle = {Advances in Neural Information Processing Systems 37},
        eprint    = {2409.06691},
    }""",
)
DPOPRO = _paper(
    "Preference Robustness for DPO with Applications to Public Health",
    "2509.02709",
    """
    @article{kim2025preference,
        title   = {{Preference Robustness for DPO with Applications to Public Health}},
        author  = {Cheol Woo Kim and Shresth Verma and Mauricio Tec and Milind Tambe},
        year    = 2025,
        eprint  = {2509.02709},
        journal = {arXiv preprint arXiv:2509.02709},
    }""",
)
MRPO = _paper(
    "Multi-Reference Preference Optimization for Large Language Models",
    "2405.16388",
    """
    @inproceedings{le2025multi,
        title     = {{Multi-Reference Preference Optimization for Large Language Models}},
        author    = {Hung Le and Quan Hung Tran and Dung Nguyen and Kien Do and Saloni Mittal and Kelechi Ogueji and Svetha Venkatesh},
        year      = 2025,
        booktitle = {AAAI Conference on Artificial Intelligence},
        eprint    = {2405.16388},
    }""",
)
MINOR = _paper(
    "Minor DPO reject penalty to increase training robustness",
    "2408.09834",
    """
    @article{xie2024minor,
        title   = {{Minor DPO reject penalty to increase training robustness}},
        author  = {Shiming Xie and Hong Chen and Fred Yu and Zeye Sun and Xiuyu Wu and Yingfan Hu},
        year    = 2024,
        eprint  = {2408.09834},
        journal = {arXiv preprint arXiv:2408.09834},
    }""",
)

"""``steppe papers``: the systems that are implemented, read from the library itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """One published system.

    Attributes:
      name: short name, as on the command line.
      title: what it is.
      function: dotted public function; its module's docstring holds equations, reference and
        deviations.
      command: the command that shows it; empty for what is used from Python only.
      baseline: not one of the systems that steppe sets out to implement, but what they are
        compared with.
    """

    name: str
    title: str
    function: str
    command: str = ""
    baseline: bool = False


PAPERS = (
    Paper(
        "lora",
        "LoRA: low-rank adaptation (Hu et al., ICLR 2022)",
        "steppe.models.overlays.lora.overlay",
        "steppe finetune vader-lora",
    ),
    Paper(
        "long-context",
        "Llama 2 Long: RoPE with adjusted base (Xiong et al., NAACL 2024)",
        "steppe.models.rotary.extend_context",
    ),
    Paper(
        "sam",
        "SAM: sharpness-aware minimisation (Foret et al., ICLR 2021)",
        "steppe.optim.sam.sam",
        "steppe finetune vader-movies --sharpness sam",
    ),
    Paper(
        "asam",
        "ASAM: SAM in a ball that does not depend on scale (Kwon et al., ICML 2021)",
        "steppe.optim.sam.asam",
        "steppe finetune vader-movies --sharpness asam",
        baseline=True,
    ),
    Paper(
        "gsam",
        "GSAM: the surrogate gap (Zhuang et al., ICLR 2022)",
        "steppe.optim.sam.gsam",
        "steppe finetune vader-movies --sharpness gsam",
        baseline=True,
    ),
    Paper(
        "looksam",
        "LookSAM: a second gradient only now and then (Liu et al., CVPR 2022)",
        "steppe.optim.looksam.looksam",
        "steppe finetune vader-movies --sharpness looksam",
    ),
    Paper(
        "esam",
        "ESAM: SAM on some tensors and some rows (Du et al., ICLR 2022)",
        "steppe.optim.esam.esam",
        "steppe finetune vader-movies --sharpness esam",
    ),
    Paper(
        "fsam",
        "FSAM: SAM with a Fisher mask (Zhong et al., Findings of EMNLP 2022)",
        "steppe.optim.fsam.fsam",
        "steppe finetune vader-movies --sharpness fsam",
    ),
    Paper(
        "flooding",
        "Flooding-X: a training loss that does not fall below a level (Liu et al., ACL 2022)",
        "steppe.optim.flooding.flooding",
    ),
    Paper(
        "roast",
        "RoAST: selective training (Kim et al., Findings of EMNLP 2023)",
        "steppe.optim.selective.selective_gradient",
    ),
    Paper(
        "prefix",
        "Prefix tuning (Li and Liang, ACL 2021)",
        "steppe.models.overlays.prefix.overlay",
        "steppe finetune vader-movies --overlay prefix",
    ),
    Paper(
        "prompt",
        "Prompt tuning (Lester et al., EMNLP 2021)",
        "steppe.models.overlays.prompt.overlay",
        "steppe finetune vader-movies --overlay prompt",
    ),
    Paper(
        "residual-prompt",
        "Residual prompt tuning (Razdaibiedina et al., Findings of ACL 2023)",
        "steppe.models.overlays.residual_prompt.overlay",
        "steppe finetune vader-movies --overlay residual-prompt",
    ),
    Paper(
        "adapters",
        "Bottleneck adapters (Houlsby et al., ICML 2019; Pfeiffer et al., EACL 2021)",
        "steppe.models.overlays.adapter.overlay",
        "steppe finetune vader-movies --overlay pfeiffer",
    ),
    Paper(
        "bitfit",
        "BitFit: biases alone (Ben Zaken et al., ACL 2022)",
        "steppe.models.overlays.bitfit.overlay",
        "steppe finetune vader-movies --overlay bitfit",
    ),
    Paper(
        "ia3",
        "(IA)^3: learned scales (Liu et al., NeurIPS 2022)",
        "steppe.models.overlays.ia3.overlay",
        "steppe finetune vader-movies --overlay ia3",
    ),
    Paper(
        "compacter",
        "Compacter: Kronecker adapters (Karimi Mahabadi et al., NeurIPS 2021)",
        "steppe.models.overlays.compacter.overlay",
        "steppe finetune vader-movies --overlay compacter",
    ),
    Paper(
        "unipelt",
        "UniPELT: gated LoRA, prefix and adapter (Mao et al., ACL 2022)",
        "steppe.models.overlays.unipelt.overlay",
        "steppe finetune vader-movies --overlay unipelt",
    ),
    Paper(
        "idpg",
        "IDPG: prompts made of each text (Wu et al., NAACL 2022)",
        "steppe.models.overlays.idpg.overlay",
        "steppe finetune vader-movies --overlay idpg",
    ),
    Paper(
        "lpt",
        "LPT: late prompt tuning (Liu et al., Findings of EMNLP 2022)",
        "steppe.models.overlays.lpt.overlay",
        "steppe finetune vader-movies --overlay lpt",
    ),
    Paper(
        "mp2",
        "MP2: modular prompts (Sun et al., ACL 2023)",
        "steppe.models.overlays.mp2.overlay",
        "steppe finetune vader-movies --overlay mp2",
    ),
    Paper(
        "prefix-fixed",
        "Fixed representations by prefixes (Huang et al., Findings of EMNLP 2023)",
        "steppe.models.overlays.prefix_fixed.overlay",
        "steppe finetune vader-movies --overlay prefix-fixed:folders=RUN+RUN",
    ),
    Paper(
        "plugat",
        "PlugAT: a plugged-in defence (Zheng et al., COLING 2022)",
        "steppe.train.plugat.plugat_loss",
        "steppe finetune vader-movies --overlay plugat",
    ),
    Paper(
        "o-lora",
        "O-LoRA: orthogonal subspaces for tasks in sequence (Wang et al., Findings of EMNLP 2023)",
        "steppe.models.overlays.o_lora.overlay",
        "steppe continual --tasks asset:vader/movies asset:sarcasm asset:vader/tweets",
    ),
    Paper(
        "loramoe",
        "LoRAMoE: LoRA experts with a balanced router (Dou et al., ACL 2024)",
        "steppe.models.overlays.loramoe.overlay",
        "steppe finetune vader-movies --overlay loramoe",
    ),
    Paper(
        "bbtv2",
        "BBT and BBTv2: prompts from forward passes alone (Sun et al., ICML and EMNLP 2022)",
        "steppe.train.blackbox.tuning.black_box",
        "steppe blackbox --method bbtv2",
    ),
    Paper(
        "average",
        "Averaging weights: model soups (Wortsman et al., ICML 2022)",
        "steppe.train.merge.leafwise.average",
        "steppe merge average BASE RUN RUN",
        baseline=True,
    ),
    Paper(
        "task-arithmetic",
        "Task arithmetic (Ilharco et al., ICLR 2023)",
        "steppe.train.merge.leafwise.task_arithmetic",
        "steppe merge task-arithmetic BASE RUN RUN",
        baseline=True,
    ),
    Paper(
        "fisher",
        "Fisher merging (Matena and Raffel, NeurIPS 2022)",
        "steppe.train.merge.fisher.fisher_merge",
        "steppe merge fisher BASE RUN RUN",
        baseline=True,
    ),
    Paper(
        "regmean",
        "RegMean (Jin et al., ICLR 2023)",
        "steppe.train.merge.regmean.regmean",
        "steppe merge regmean BASE RUN RUN",
        baseline=True,
    ),
    Paper(
        "ties",
        "TIES merging (Yadav et al., NeurIPS 2023)",
        "steppe.train.merge.ties.ties",
        "steppe merge ties BASE RUN RUN",
    ),
    Paper(
        "dare",
        "DARE merging (Yu et al., ICML 2024)",
        "steppe.train.merge.dare.dare",
        "steppe merge dare BASE RUN RUN",
    ),
    Paper(
        "adamerging",
        "AdaMerging (Yang et al., ICLR 2024)",
        "steppe.train.merge.adaptive.adamerging",
        "steppe merge adamerging BASE RUN RUN",
    ),
    Paper(
        "concrete",
        "Concrete subspace learning (Tang et al., 2023)",
        "steppe.train.merge.concrete.concrete_adamerging",
        "steppe merge concrete-adamerging BASE RUN RUN",
    ),
    Paper(
        "kd",
        "Knowledge distillation of any divergence (Hinton et al. 2015; GKD, DistiLLM, ...)",
        "steppe.train.distill.kd.kd",
        "steppe distill movies-cut",
    ),
    Paper(
        "atkd",
        "ATKD: adaptive teaching (Zhong et al., ACL 2024)",
        "steppe.train.distill.atkd.atkd",
        "steppe distill smollm2-cut --scheme atkd --weight 1",
    ),
    Paper(
        "fdistill",
        "f-distill: each half of a divergence on its writer's texts (Wen et al., ACL 2023)",
        "steppe.train.distill.fdistill.fdistill",
        "steppe distill smollm2-cut --scheme fdistill --divergence jsd",
    ),
    Paper(
        "kid",
        "KID: imperfect data (Zhong et al., Findings of EMNLP 2024)",
        "steppe.train.distill.kid.kid",
        "steppe distill spider-cut",
    ),
    Paper(
        "dwt",
        "DWT: weak teachers (Lee et al., Findings of ACL 2023)",
        "steppe.train.distill.dwt.dwt",
        "steppe distill movies-cut --scheme dwt",
    ),
    Paper(
        "ctcd",
        "CTCD: co-training and co-distillation (Lee et al., Findings of EMNLP 2023)",
        "steppe.train.distill.ctcd.ctcd",
        "steppe distill movies-cut --scheme ctcd",
    ),
    Paper(
        "zsaq",
        "ZSAQ: zero-shot sharpness-aware quantization (Zhu et al., EMNLP 2023)",
        "steppe.train.quantize.zsaq.make_zsaq_step",
        "steppe quantize RUN --bits w4a8 --method zsaq --out OUT",
    ),
    Paper(
        "gptq",
        "GPTQ: rounding with second-order information (Frantar et al., ICLR 2023)",
        "steppe.train.quantize.gptq.gptq",
        "steppe quantize RUN --bits w4a8 --method gptq --out OUT",
        baseline=True,
    ),
)

"""The keys of `adapter_config.json`: honoured, known to change nothing, or refused; one table each.

The documentation is made from these tables.
"""

HONOURED = {
    "alpha_pattern": "alphas by module pattern",
    "base_model_name_or_path": "compared with the base by `lorasrv check`, which warns if they differ",
    "bias": "`all` and `lora_only`: trained biases stand in place of the base's",
    "ensure_weight_tying": "head and embedding adapted together, where the base ties them",
    "exclude_modules": "list or regular expression",
    "init_lora_weights": "true, false, gaussian, orthogonal, eva, mica; others change the base: `lorasrv convert`",
    "init_r": "AdaLoRA's divisor of the scale",
    "layers_pattern": "with `layers_to_transform`",
    "layers_to_transform": "with a list of targets",
    "lora_alpha": "numerator of the scale",
    "lora_bias": "a bias on B, of LoRA and rsLoRA",
    "modules_to_save": "output head, token embedding and norms",
    "peft_type": "LORA and ADALORA",
    "r": "rank; ignored by AdaLoRA, as in PEFT",
    "rank_pattern": "ranks by module pattern; AdaLoRA's surviving rows",
    "target_modules": "list, regular expression or `all-linear`; linear layers, output head, token embedding",
    "trainable_token_indices": "rows of the token embedding and the output head",
    "use_dora": "DoRA, also of the head and the embedding",
    "use_rslora": "rank-stabilized scale",
}
"""Keys whose values are read, and what is done with them."""

INERT = {
    "auto_mapping": "names a class; nothing is imported",
    "eva_config": "initialization",
    "fan_in_fan_out": "only of Conv1D layers, which no served base has",
    "inference_mode": "training",
    "lora_dropout": "training",
    "megatron_core": "names a package; nothing is imported",
    "peft_version": "information",
    "qalora_group_size": "only with use_qalora",
    "revision": "information",
    "task_type": "information",
}
"""Keys that change nothing in a served adapter, whatever their value, and why."""

INERT_ADALORA = dict.fromkeys(
    ("beta1", "beta2", "deltaT", "orth_reg_weight", "r", "target_r", "tfinal", "tinit", "total_step"),
    "AdaLoRA's training schedule",
)
"""Keys that change nothing in a served AdaLoRA adapter, and why."""

INERT_INITS = frozenset({"eva", "gaussian", "mica", "orthogonal"})
"""Values of `init_lora_weights`, beside true and false, that leave the base's weights alone."""

UNSUPPORTED = {
    "alora_invocation_tokens": "activation by invocation tokens (aLoRA)",
    "arrow_config": "Arrow routing",
    "corda_config": "CorDA initialization, which changes the base",
    "kasa_config": "KaSA, which changes the base",
    "layer_replication": "replicated layers",
    "loftq_config": "LoftQ initialization, which changes the base",
    "lora_ga_config": "LoRA-GA initialization, which changes the base",
    "megatron_config": "Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "adapted bare parameters",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
"""Keys that change an adapter's result and are refused unless they are null."""

OFF_WHEN_EMPTY = frozenset({"layer_replication", "loftq_config", "megatron_config", "target_parameters", "use_qalora"})
"""Keys among them that false and empty switch off, too; an empty object is enough to have PEFT make a KaSA."""

NOT_OF_ADALORA = ("use_dora", "use_rslora", "alpha_pattern", "lora_bias")
"""Keys that PEFT's AdaLoRA refuses or ignores; live values are refused."""

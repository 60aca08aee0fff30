"""vLLM plugin for ResMoE checkpoints: center and residuals stay compressed in memory."""


def register() -> None:
    """Entry point ``vllm.general_plugins``: called in every vLLM process; may run again, opens no device."""
    import vllm

    from resmoe_vllm.version import register_refusal, version_complaint

    complaint = version_complaint(vllm.__version__)
    if complaint is not None:
        register_refusal(complaint)
        return

    from compress_tools.format.schema import QUANT_METHOD
    from resmoe_vllm import compat, ops, stored_files
    from resmoe_vllm.config import ResMoEConfig

    compat.allow_amx()
    compat.complete_expert_names()
    compat.watch_weights(stored_files.watched)
    compat.surround_loading(stored_files.loading)
    ops.register_op()
    compat.register_quantization_config(QUANT_METHOD)(ResMoEConfig)

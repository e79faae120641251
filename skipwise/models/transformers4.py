"""The model types that transformers 4 has, of those with a language model, and what some make of RoPE. No torch.

Of its last release, 4.57.3 (the auto mappings and classes of its wheel): no later one will add any.
"""

MODEL_TYPES = frozenset(
    """
    albert apertus arcee aria aria_text aya_vision bamba bart bert bert-generation big_bird bigbird_pegasus biogpt
    bitnet blenderbot blenderbot-small blip blip-2 bloom blt camembert chameleon codegen cohere cohere2
    cohere2_vision convbert cpmant ctrl data2vec-text dbrx deberta deberta-v2 deepseek_v2 deepseek_v3 deepseek_vl
    deepseek_vl_hybrid diffllama distilbert doge dots1 electra emu3 ernie ernie4_5 ernie4_5_moe esm evolla exaone4
    falcon falcon_h1 falcon_mamba flaubert flex_olmo florence2 fnet funnel fuyu gemma gemma2 gemma3 gemma3_text
    gemma3n gemma3n_text git glm glm4 glm4_moe glm4v glm4v_moe glm4v_moe_text glm4v_text got_ocr2 gpt-sw3 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared
    helium hunyuan_v1_dense hunyuan_v1_moe ibert idefics idefics2 idefics3 instructblip instructblipvideo internvl
    jamba janus jetmoe kosmos-2 kosmos-2.5 kyutai_speech_to_text layoutlm lfm2 lfm2_vl llama llama4 llama4_text
    llava llava_next llava_next_video llava_onevision longcat_flash longformer luke mamba mamba2 marian mbart
    megatron-bert minimax ministral mistral mistral3 mixtral mllama mobilebert modernbert modernbert-decoder moshi
    mpnet mpt mra musicgen musicgen_melody mvp nemotron nystromformer olmo olmo2 olmo3 olmoe openai-gpt opt ovis2
    paligemma pegasus perceiver perception_lm persimmon phi phi3 phi4_multimodal phimoe pix2struct plbart prophetnet
    qwen2 qwen2_5_vl qwen2_5_vl_text qwen2_moe qwen2_vl qwen2_vl_text qwen3 qwen3_moe qwen3_next qwen3_vl
    qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text recurrent_gemma reformer rembert roberta roberta-prelayernorm
    roc_bert roformer rwkv seed_oss shieldgemma2 smollm3 smolvlm speech_to_text squeezebert stablelm starcoder2
    tapas trocr udop vaultgemma video_llava vipllava vision-encoder-decoder whisper xglm xlm xlm-roberta xlm-
    roberta-xl xlnet xlstm xmod yoso zamba zamba2
    """.split()
)
# Types whose class stops at a `rope_scaling` with other keys than these (their configuration_*.py).
ONLY_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("chameleon", "fuyu", "olmo", "olmo2"), ("factor", "type")),
    **dict.fromkeys(("phi3", "phi4_multimodal"), ("long_factor", "short_factor", "type")),
}
# Types that compute with `rope_theta` alone, whatever their `rope_scaling` is (their modeling_*.py).
WITHOUT_SCALING = frozenset({"nemotron"})
# Types that have a name for the theta of windowed layers, and compute these with that of the others.
ONE_THETA = frozenset({"modernbert-decoder"})

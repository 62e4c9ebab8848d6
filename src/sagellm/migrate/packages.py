"""What became of the public names of isagellm 0.1 - 0.5, package by package.

The six packages kept their names and not all of their contents. ``package.__getattr__`` of each asks `resolve` for a name that it
does not have: it is another name's deprecated spelling (and works), or it is gone, and the ImportError says what to use.
"""

from __future__ import annotations

import importlib
from typing import Any

from sagellm.migrate.forward import warn_deprecated

__all__ = ["GONE", "MOVED", "resolve"]

_TYPES = [
    "Request",
    "Response",
    "Metrics",
    "Error",
    "ErrorCode",
    "Timestamps",
    "StreamEvent",
    "StreamEventStart",
    "StreamEventDelta",
    "StreamEventEnd",
    "KVAllocateParams",
    "KVHandle",
    "KVMigrateParams",
]
_ENGINE = ["LLMEngine", "LLMEngineConfig", "BackendConfig", "create_engine", "create_backend", "MockEngine"]
_CONTROL = [
    "EngineInfo",
    "EngineState",
    "RequestMetadata",
    "RequestPriority",
    "RequestStatus",
    "RequestType",
    "SchedulingDecision",
    "SchedulingMetrics",
]

MOVED: dict[str, dict[str, str]] = {
    "sagellm": {
        **{name: f"sagellm_protocol:{name}" for name in _TYPES},
        **{name: f"sagellm.llm_engine:{name}" for name in _ENGINE},
        **{name: f"sagellm_control_plane.types:{name}" for name in ("EngineInfo", "EngineState", "SchedulingDecision")},
        "EngineConfig": "sagellm_core.config:EngineConfig",
        "ControlPlaneManager": "sagellm_control_plane.manager:ControlPlaneManager",
        "BackendProvider": "sagellm_backend.base:Backend",
        "CapabilityDescriptor": "sagellm_backend.base:Capability",
        "EmbeddingClient": "sagellm.client:UnifiedInferenceClient",
        "OllamaClient": "sagellm.client:UnifiedInferenceClient",
    },
    "sagellm_core": {
        **{name: f"sagellm.llm_engine:{name}" for name in _ENGINE},
        "EngineConfig": "sagellm_core.config:EngineConfig",
        "EngineCore": "sagellm_core.engine:Engine",
        "EngineCoreConfig": "sagellm_core.config:EngineConfig",
        "ContinuousBatchingScheduler": "sagellm_core.scheduler:Scheduler",
        "SchedulerConfig": "sagellm_core.scheduler:SchedulerLimits",
        "SchedulerOutput": "sagellm_core.scheduler:Schedule",
        "SamplingParams": "sagellm_protocol.sampling:SamplingParams",
        "load_model": "sagellm_core.loader:open_model",
        "__version__": "sagellm:__version__",
    },
    "sagellm_protocol": {
        "CapabilityDescriptor": "sagellm_backend.base:Capability",
        "CURRENT_VERSION": "sagellm_protocol.codec:PROTOCOL_VERSION",
        "ModelInfo": "sagellm_control_plane.live.observe:ModelInfo",
        "__version__": "sagellm:__version__",
    },
    "sagellm_backend": {
        "get_provider": "sagellm_backend.auto:pick",
        "list_providers": "sagellm_backend.registry:available",
        "BackendProvider": "sagellm_backend.base:Backend",
        "CapabilityDescriptor": "sagellm_backend.base:Capability",
        "CPUBackendProvider": "sagellm_backend.cpu:CpuBackend",
        "create_cpu_backend": "sagellm_backend.cpu:CpuBackend",
        "__version__": "sagellm:__version__",
    },
    "sagellm_gateway": {
        "create_app": "sagellm_gateway.server:create_app",
        "__version__": "sagellm:__version__",
    },
    "sagellm_control_plane": {
        **{name: f"sagellm_control_plane.types:{name}" for name in _CONTROL},
        "ControlPlaneManager": "sagellm_control_plane.manager:ControlPlaneManager",
        "EngineClient": "sagellm_protocol.ports:EngineClient",
        "RetryPolicy": "sagellm.transport:RetryPolicy",
        "EngineClientError": "sagellm_protocol.errors:SageError",
        "EngineTimeoutError": "sagellm_protocol.errors:DeadlineExceededError",
        "EngineUnavailableError": "sagellm_protocol.errors:UnavailableError",
        "EngineRequestError": "sagellm_protocol.errors:InvalidArgumentError",
        "__version__": "sagellm:__version__",
    },
}
"""Package -> old name -> ``module:name`` that it stands for."""

_CLIENT = "sagellm.UnifiedInferenceClient"
_DEMO = "`sage-llm demo --workload year1 -o metrics.json` runs and judges the workloads"
_DEVICE = "a backend describes its device by Backend.capability() and Backend.memory() (sagellm_backend.base)"
_KERNEL = "kernels are the backend's own: a new device implements Backend and Runner (sagellm_backend.base)"
_PLUGIN = "a backend is found by the entry-point group `sagellm.backends`; other plugin kinds are gone"
_POLICY = (
    "policies are chosen by name: ControlPlaneManager(scheduling_policy=..., routing_strategy=...), update_policy(name)"
)
_WIRE_TYPES = "the wire types of the HTTP dialects are in sagellm_gateway.dialects; the neutral ones are GenerationRequest and its events"
_PD = "prefill/decode separation is a routing matter of the manager: ControlPlaneManager(enable_pd_separation=True)"
_MANAGER = "the manager does it: see sagellm_control_plane.manager.ControlPlaneManager"
_IR = "the intermediate representation of schedules is gone: decisions are pure functions (sagellm_control_plane.policies, .routing)"
_TRACE = "metrics are at GET /metrics of the gateway, traces by the extra `otel`"
_CONFIG = "settings are read by `sage-llm config`; an engine's are sagellm_core.config.EngineConfig"
_VERSION = "sagellm_protocol.codec refuses unknown versions itself; PROTOCOL_VERSION is the one it speaks"
_LOADER = "models are opened by sagellm_core.loader.open_model and their text side by sagellm_core.text.load_chat_model"


def _all(hint: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), hint)


GONE: dict[str, dict[str, str]] = {
    "sagellm": {
        **_all(_DEMO, "DemoConfig DemoRunner WorkloadConfig WorkloadSegment demo_main"),
        **_all(_DEVICE, "DType KernelKind"),
        **_all(_CONFIG, "load_config"),
        **_all(
            f"{_CLIENT} has chat, generate and embed",
            "MixedInferenceClient MixedRequest MixedResult RequestKind EmbeddingService LocalHashEmbedder",
        ),
    },
    "sagellm_core": {
        **_all(_DEMO, "DemoConfig DemoRunner RunnerContext OutputConfig WorkloadConfig WorkloadSegment demo_main"),
        **_all(_CONFIG, "load_config merge_configs validate_config_strict setup_logger"),
        **_all(
            _PLUGIN,
            "PluginResolutionError list_entry_points resolve_kind BackendPlugin BackendPluginMeta EnginePlugin EnginePluginMeta "
            "SchedulerPlugin SchedulerPluginMeta AcceleratorPlugin AcceleratorPluginMeta PluginRegistry PluginRegistrySnapshot "
            "PluginChain PluginChainConfig QuantizationAcceleratorPlugin KernelFusionAcceleratorPlugin SpeculativeAcceleratorPlugin",
        ),
        **_all(
            "a backend is Backend.load -> Runner.step (sagellm_backend.base)",
            "ExecutorBase ExecutorConfig UniprocExecutor Worker ModelRunner AdaptivePrecisionStrategy BaseStrategy "
            "CUDAGraphCaptureStrategy DynamicBatchingStrategy RuntimeOptimizer RuntimeStats DistributedStrategy TensorParallelStrategy",
        ),
        **_all(
            _PD,
            "DistributedConfig DistributedRuntime RuntimeState PDExecutionContext PDSeparatedExecutor KVTransferChannel PrefillEngine "
            "PrefillResult DecodeEngine DecodeResult",
        ),
        **_all(
            "engines run as `python -m sagellm_core.server` or behind `sage-llm serve`",
            "engine_server_app serve_engine",
        ),
        **_all(_LOADER, "ModelLoader InputProcessor ProcessedInput TokenizerWrapper"),
        **_all("sampling is the backend's: see sagellm_protocol.SamplingParams", "Sampler GreedySampler"),
        **_all("Engine.status() and GET /metrics have them", "MetricsCollector EngineMetrics HealthStatus"),
    },
    "sagellm_protocol": {
        **_all(
            _DEVICE,
            "DType KernelKind DeviceStr parse_device_str format_device_str DEVICE_TYPE_CPU DEVICE_TYPE_CUDA DEVICE_TYPE_NPU "
            "DEVICE_TYPE_ASCEND DEVICE_TYPE_ROCM DEVICE_TYPE_XPU DeviceClass",
        ),
        **_all(
            "an engine's cache is set up by sagellm_core.config.CacheOptions",
            "KVPriority KVQoSPolicy KVHookPayload KVOffloadTrigger KVRestoreTrigger HeteroSchedulingHint KVOffloadSpec KVOffloadStats",
        ),
        **_all("sagellm_protocol.SamplingParams and its presets", "DecodingStrategy DEFAULT_SAMPLING_PARAMS"),
        **_all(
            _KERNEL,
            "OperatorType OperatorConstraint LogicalOperator PhysicalOperator OperatorMapping OperatorRegistryEntry "
            "OperatorRegistryQuery OperatorRegistrySnapshot",
        ),
        **_all(
            _WIRE_TYPES,
            "ChatCompletionRequest ChatCompletionResponse ChatCompletionChoice ChatCompletionUsage ChatCompletionStreamResponse "
            "ChatCompletionStreamChoice ChatCompletionStreamDelta CompletionRequest CompletionResponse CompletionChoice CompletionUsage "
            "EmbeddingResponse EmbeddingData EmbeddingUsage ModelListResponse OpenAIError OpenAIErrorResponse",
        ),
        **_all(
            "communication between devices is torch.distributed's, inside a backend",
            "CommBackendType ReduceOp CollectiveOp CommStatus TopologyType CommGroupInfo CollectiveRequest CollectiveResponse "
            "P2PSendRequest P2PSendResponse P2PRecvRequest P2PRecvResponse CommOperationMetrics CommTopologyDescriptor",
        ),
        **_all(
            "precision is chosen by --quant and --kv-dtype (sagellm_core.config.DeviceOptions), speculation by SpeculationOptions",
            "QuantizationScheme QuantizationGranularity SparseFormat SparsityPattern SpeculativeStrategy FusionLevel QuantizationConfig "
            "SparseConfig SpeculativeDecodingConfig FusionConfig CompressionConfig CompressionMetrics",
        ),
        **_all(
            _VERSION,
            "BACKWARD_COMPATIBLE_SINCE FROZEN_INTERFACES ProtocolVersion negotiate_version is_interface_frozen get_interface_since_version",
        ),
        **_all(
            "the gateway listens on 8889 unless told otherwise, engines on unix sockets",
            "SageLLMPorts SAGELLM_ENGINE_PORT SAGELLM_EMBEDDING_PORT SAGELLM_GATEWAY_PORT SAGELLM_SERVE_PORT",
        ),
        **_all(_PD, "EngineRole KVTransferState PDDispatchPlan KVTransferRequest KVTransferResult"),
    },
    "sagellm_backend": {
        **_all("pip install a distribution with the entry point `sagellm.backends`", "register_provider"),
        **_all("sagellm_backend.registry.available() lists what can run here", "is_provider_available"),
        **_all(_DEVICE, "DType KernelKind"),
        **_all(
            _KERNEL,
            "Stream Event KVBlock Kernel KernelRegistry RegisteredKernel LinearKernel CUDAFlashAttention2Kernel "
            "is_flash_attention_2_available CPULinearKernel W4A16LinearKernel W4A16TritonDequantKernel CUDAW4A16LinearKernel "
            "EmbeddingKernel CPUEmbeddingKernel RMSNormKernel CPURMSNormKernel LayerNormKernel SiLUKernel CPUSiLUKernel GELUKernel "
            "ReLUKernel AttentionBackend AttentionMetadata CPUAttentionBackend MemoryAllocator MemoryHandle MemoryPool pin_memory "
            "unpin_memory PipelineStage PipelineMetrics MultiStagePipeline create_multi_stage_pipeline FeatureVariantManager "
            "VariantDecision DEFAULT_FEATURE_VARIANT_MANAGER",
        ),
        **_all(
            "sagellm_backend.quant has the formats: quantize and dequantize",
            "DTypeConverter QuantizationMode QuantizationParams ConversionMetrics calculate_conversion_metrics convert_bf16_to_fp32 "
            "convert_fp32_to_bf16 compute_fp8_quantization_params quantize_to_fp8_torch dequantize_from_fp8_torch "
            "compute_fp8_quantization_params_numpy quantize_to_fp8_numpy dequantize_from_fp8_numpy W4A16Weights dequantize_w4a16 "
            "validate_conversion infer_optimal_dtype auto_convert",
        ),
        **_all(
            "a backend is picked by name: sagellm_backend.auto.pick(name)",
            "CUDABackendProvider create_cuda_backend AscendBackendProvider create_ascend_backend",
        ),
    },
    "sagellm_gateway": {
        **_all("make one: sagellm_gateway.server.create_app()", "app"),
        **_all(
            "pass it: sagellm_gateway.server.create_app(control_plane=...)",
            "configure_control_plane configure_pd_router",
        ),
        **_all(
            "engines are reached through the control plane: ControlPlaneManager.register_engine",
            "get_adapter set_adapter BaseAdapter DirectProxyAdapter SageLLMAdapter EngineRouter",
        ),
        **_all(_POLICY, "LoadBalanceStrategy"),
    },
    "sagellm_control_plane": {
        **_all(
            _MANAGER,
            "AdmissionGuard AdmissionDecision EngineLifecycleManager ScalingManager ScalingRecommendation EmbeddingEngine",
        ),
        **_all(_MANAGER, "EngineFailoverManager FailoverEvent LoadBalancer RequestRouter PlacementDecision"),
        **_all("sagellm_control_plane.types has ExecutionInstance", "ExecutionInstanceType"),
        **_all(
            _IR,
            "SchedulerIR IRNode TaskNode ComputationNode DependencyEdge ResourceAllocation ParallelismConfig ParallelismStrategy NodeType "
            "IRBuilder IROptimizer IRExecutor DefaultIRExecutor ExecutionCommand",
        ),
        **_all(
            _POLICY,
            "SchedulingPolicy FIFOPolicy PriorityPolicy SLOAwarePolicy AdaptivePolicy LoadBalancingPolicy KVAwareSchedulingPolicy "
            "KVAwareIRPolicy LifetimeAwarePolicy PrefixGroupingPolicy HeterogeneousSchedulingPolicy SpeculativeSchedulingPolicy",
        ),
        **_all(
            "latency is predicted by sagellm_control_plane.predictor",
            "LifetimePredictor LengthBasedPredictor HistoricalPredictor HybridHeuristicPredictor",
        ),
        **_all(
            "an engine in this process is sagellm_core.local.LocalEngine, given to ControlPlaneManager.add_engine",
            "LocalEngineClient",
        ),
        **_all(f"{_CLIENT} takes timeouts and retries", "ClientConfig RequestContext"),
        **_all(
            _TRACE,
            "ControlPlaneMetricsCollector TraceContext SchedulingSpan get_current_trace_context ControlPlanePrometheusExporter "
            "PROMETHEUS_AVAILABLE",
        ),
        **_all(_PD, "PDRouter PDEngineEntry"),
    },
}
"""Package -> old name without a successor -> what to use instead."""


def resolve(package: str, name: str) -> Any:
    """Return what `package.name` stands for; called by the ``__getattr__`` of each package.

    Raises:
        AttributeError: no version had that name.
        ImportError: the name is gone; the message says what to use.
    """
    new = MOVED[package].get(name)
    if new is not None:
        module, _, attribute = new.partition(":")
        if name != "__version__":
            warn_deprecated(f"{package}.{name}", new.replace(":", "."))
        return getattr(importlib.import_module(module), attribute)
    hint = GONE[package].get(name)
    if hint is not None:
        raise ImportError(f"{package}.{name} of isagellm 0.5 has no successor: {hint}", name=package)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")

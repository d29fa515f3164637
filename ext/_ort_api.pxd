"""ONNX Runtime's C interface: opaque handles, table indices, signatures; declarations only.

The table OrtApi is append-only: an index means the same in every version from its first on. All
that stand here are in version 20 (release 1.20), the oldest that is accepted.

Source: onnxruntime's C API documentation, struct OrtApi.
"""

from libc.stdint cimport int64_t, uint32_t

ctypedef void OrtEnv
ctypedef void OrtStatus
ctypedef void OrtSession
ctypedef void OrtSessionOptions
ctypedef void OrtRunOptions
ctypedef void OrtMemoryInfo
ctypedef void OrtValue
ctypedef void OrtAllocator
ctypedef void OrtTypeInfo
ctypedef void OrtTensorInfo         # OrtTensorTypeAndShapeInfo

cdef struct OrtApiBase:
    void** (*GetApi)(uint32_t version) noexcept nogil
    const char* (*GetVersionString)() noexcept nogil

cdef enum:                          # indices
    GetErrorCode = 1
    GetErrorMessage = 2
    CreateEnv = 3
    DisableTelemetryEvents = 6
    CreateSessionFromArray = 8
    Run = 9
    CreateSessionOptions = 10
    EnableCpuMemArena = 18
    DisableCpuMemArena = 19
    SetSessionLogSeverityLevel = 22
    SetSessionGraphOptimizationLevel = 23
    SetIntraOpNumThreads = 24
    SetInterOpNumThreads = 25
    SessionGetInputCount = 30
    SessionGetOutputCount = 31
    SessionGetInputTypeInfo = 33
    SessionGetOutputTypeInfo = 34
    SessionGetInputName = 36
    SessionGetOutputName = 37
    CreateTensorAsOrtValue = 48
    CreateTensorWithDataAsOrtValue = 49
    GetTensorMutableData = 51
    FillStringTensor = 52
    GetStringTensorDataLength = 53
    GetStringTensorContent = 54
    CastTypeInfoToTensorInfo = 55
    GetOnnxTypeFromTypeInfo = 56
    GetTensorElementType = 60
    GetDimensionsCount = 61
    GetDimensions = 62
    GetTensorTypeAndShape = 65
    CreateCpuMemoryInfo = 69
    AllocatorFree = 76
    GetAllocatorWithDefaultOptions = 78
    ReleaseStatus = 93
    ReleaseSession = 95
    ReleaseValue = 96
    ReleaseTypeInfo = 98
    ReleaseTensorTypeAndShapeInfo = 99
    ReleaseSessionOptions = 100
    AddSessionConfigEntry = 130

cdef enum:
    ORT_INVALID_ARGUMENT = 2        # OrtErrorCode
    ONNX_TYPE_TENSOR = 1            # ONNXType
    ONNX_TYPE_SEQUENCE = 2
    ONNX_TYPE_MAP = 3
    ORT_DEVICE_ALLOCATOR = 0        # OrtAllocatorType
    ORT_ENABLE_ALL = 99             # GraphOptimizationLevel
    ORT_LOGGING_FATAL = 4           # OrtLoggingLevel

ctypedef int (*of_code)(const OrtStatus*) noexcept nogil
ctypedef const char* (*of_message)(const OrtStatus*) noexcept nogil
ctypedef OrtStatus* (*of_env)(int, const char*, OrtEnv**) noexcept nogil
ctypedef OrtStatus* (*of_make)(void**) noexcept nogil
ctypedef OrtStatus* (*of_self)(void*) noexcept nogil
ctypedef OrtStatus* (*of_int)(void*, int) noexcept nogil
ctypedef OrtStatus* (*of_entry)(void*, const char*, const char*) noexcept nogil
ctypedef OrtStatus* (*of_session)(
    const OrtEnv*, const void*, size_t, const OrtSessionOptions*, OrtSession**
) noexcept nogil
ctypedef OrtStatus* (*of_run)(
    OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, size_t,
    const char* const*, size_t, OrtValue**
) noexcept nogil
ctypedef OrtStatus* (*of_size)(const void*, size_t*) noexcept nogil
ctypedef OrtStatus* (*of_name)(const OrtSession*, size_t, OrtAllocator*, char**) noexcept nogil
ctypedef OrtStatus* (*of_type)(const OrtSession*, size_t, OrtTypeInfo**) noexcept nogil
ctypedef OrtStatus* (*of_cast)(const OrtTypeInfo*, const OrtTensorInfo**) noexcept nogil
ctypedef OrtStatus* (*of_get_int)(const void*, int*) noexcept nogil
ctypedef OrtStatus* (*of_dims)(const OrtTensorInfo*, int64_t*, size_t) noexcept nogil
ctypedef OrtStatus* (*of_memory)(int, int, OrtMemoryInfo**) noexcept nogil
ctypedef OrtStatus* (*of_wrap)(
    const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t, int, OrtValue**
) noexcept nogil
ctypedef OrtStatus* (*of_tensor)(
    OrtAllocator*, const int64_t*, size_t, int, OrtValue**
) noexcept nogil
ctypedef OrtStatus* (*of_data)(OrtValue*, void**) noexcept nogil
ctypedef OrtStatus* (*of_fill)(OrtValue*, const char* const*, size_t) noexcept nogil
ctypedef OrtStatus* (*of_content)(
    const OrtValue*, void*, size_t, size_t*, size_t
) noexcept nogil
ctypedef OrtStatus* (*of_shape)(const OrtValue*, OrtTensorInfo**) noexcept nogil
ctypedef OrtStatus* (*of_free)(OrtAllocator*, void*) noexcept nogil
ctypedef void (*of_release)(void*) noexcept nogil

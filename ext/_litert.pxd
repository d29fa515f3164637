"""LiteRT's C API in our own words: declarations only.

The C API has no headers in the package. What is declared here is what versions 2.1.6 to 2.3 take
(``litert.ABI_FIRST``): the argument lists moved before, so other versions are not called.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t

from ._engine cimport DIMS_MAX

cdef extern from "<dlfcn.h>" nogil:
    void* dlopen(const char* path, int flags)
    void* dlsym(void* library, const char* name)
    const char* dlerror()
    enum: RTLD_NOW
    enum: RTLD_LOCAL

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* mutex, const void* attributes)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)
    int pthread_mutex_destroy(pthread_mutex_t* mutex)

ctypedef void* Handle           # environment, model, options, ...: all opaque, all owned by us
ctypedef unsigned char Bool     # C's bool in an argument list

cdef enum:
    PORTS_MAX = 256             # inputs or outputs of a signature
    LOG_TAG = 25                # LiteRtEnvOptionTag: least severity that is logged
    REGISTER_TAG = 24           # which accelerators to look for
    LIBRARIES_TAG = 22          # folder of the accelerators' libraries
    LOG_NOTHING = 4
    ANY_INT = 2
    ANY_STRING = 8
    LOCK_READ = 0
    LOCK_WRITE = 1


cdef struct EnvOption:          # LiteRtEnvOption
    int32_t tag                 # which option
    int32_t gap
    int32_t type                # of the value: ANY_INT or ANY_STRING
    int32_t gap2
    int64_t value               # a number or a pointer to a string

cdef struct Layout:             # LiteRtLayout
    uint32_t bits               # rank in the low 7 bits, then whether strides are given
    int32_t[8] dims
    uint32_t[8] strides

cdef struct RankedType:         # LiteRtRankedTensorType
    int32_t element             # LiteRtElementType
    Layout layout

cdef struct Port:               # an input or output of the signature
    RankedType type             # with the dims of now
    int32_t onnx                # Type of _engine.pxd
    int32_t rank
    int32_t free_axes           # whether any axis was -1 in the model
    int32_t[DIMS_MAX] fixed     # the model's dims, -1 free
    int64_t size                # bytes of now
    Handle buffer               # LiteRtTensorBuffer, padded and aligned by LiteRT

# Binding.state: for each output the bytes that run placed at its data; 0 if it is the caller's
ctypedef int64_t Room

cdef struct Api:
    int (*environment_new)(int, const EnvOption*, Handle*) noexcept nogil
    int (*model_new)(Handle, const void*, size_t, Handle*) noexcept nogil
    void (*model_free)(Handle) noexcept nogil
    int (*options_new)(Handle*) noexcept nogil
    void (*options_free)(Handle) noexcept nogil
    int (*options_accelerators)(Handle, int) noexcept nogil
    int (*opaque_new)(const char*, void*, void (*)(void*) noexcept nogil, Handle*) noexcept nogil
    int (*opaque_add)(Handle, Handle) noexcept nogil
    int (*compiled_new)(Handle, Handle, Handle, Handle*) noexcept nogil
    void (*compiled_free)(Handle) noexcept nogil
    int (*accelerated)(Handle, Bool*) noexcept nogil
    int (*signatures_n)(Handle, size_t*) noexcept nogil
    int (*signature_get)(Handle, size_t, Handle*) noexcept nogil
    int (*signature_key)(Handle, const char**) noexcept nogil
    int (*inputs_n)(Handle, size_t*) noexcept nogil
    int (*outputs_n)(Handle, size_t*) noexcept nogil
    int (*input_name)(Handle, size_t, const char**) noexcept nogil
    int (*output_name)(Handle, size_t, const char**) noexcept nogil
    int (*input_needs)(Handle, size_t, size_t, Handle*) noexcept nogil
    int (*output_needs)(Handle, size_t, size_t, Handle*) noexcept nogil
    int (*resize)(Handle, size_t, size_t, const int*, size_t) noexcept nogil
    int (*layouts)(Handle, size_t, size_t, Layout*, Bool) noexcept nogil
    int (*buffer_new)(Handle, const RankedType*, Handle, Handle*) noexcept nogil
    void (*buffer_free)(Handle) noexcept nogil
    int (*buffer_size)(Handle, size_t*) noexcept nogil
    int (*buffer_lock)(Handle, void**, int) noexcept nogil
    int (*buffer_unlock)(Handle) noexcept nogil
    int (*run)(Handle, size_t, size_t, Handle*, size_t, Handle*) noexcept nogil
    int (*messages)(Handle, char**) noexcept nogil
    int (*messages_clear)(Handle) noexcept nogil

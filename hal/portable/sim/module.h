/* Read after the source of a module: what the engine finds in it. */
template <class T>
struct hal_sim_pointee {
  static constexpr unsigned size = 0;
};
template <class T>
struct hal_sim_pointee<T *> {
  static constexpr unsigned size = sizeof(T);
};

template <unsigned... I>
struct hal_sim_numbers {};
template <unsigned N, unsigned... I>
struct hal_sim_up_to : hal_sim_up_to<N - 1, N - 1, I...> {};
template <unsigned... I>
struct hal_sim_up_to<0, I...> {
  typedef hal_sim_numbers<I...> type;
};

/* A kernel called with the addresses of its arguments. */
template <auto kernel>
struct hal_sim_call;
template <typename... Types, void (*kernel)(Types...)>
struct hal_sim_call<kernel> {
  static constexpr unsigned count = sizeof...(Types);
  static constexpr hal_sim_parameter parameters[count + 1] = {
      {sizeof(Types), alignof(Types), hal_sim_pointee<Types>::size}..., {}};
  template <unsigned... I>
  HAL_SIM_UNSEEN static void unpacked(void **given, hal_sim_numbers<I...>) {
    kernel(*(Types *)given[I]...);
  }
  HAL_SIM_UNSEEN static void call(void **given) {
    unpacked(given, typename hal_sim_up_to<count>::type());
  }
};
#define HAL_SIM_ENTRY(kernel, names) \
  { #kernel, hal_sim_call<kernel>::call, names, hal_sim_call<kernel>::parameters, hal_sim_call<kernel>::count }

static thread_local char hal_sim_local __attribute__((used, aligned(16)));
extern "C" HAL_SIM_UNSEEN __attribute__((visibility("default"))) void *hal_sim_anchor() {
  return &hal_sim_local;
}

#ifdef HAL_SIM_CHECKED
extern "C" __attribute__((visibility("default"))) char hal_sim_checked;
char hal_sim_checked;
/* Compilers that look for races call these before every access to memory: the engine looks for more than races. */
#define HAL_SIM_HOOK extern "C" HAL_SIM_UNSEEN __attribute__((visibility("hidden")))
#define HAL_SIM_ACCESS(address, size, kind) hal_sim->access(address, size, kind, __builtin_return_address(0))
#define HAL_SIM_SIZES(X) X(1) X(2) X(4) X(8) X(16)
#define X(n)                                                                                                      \
  HAL_SIM_HOOK void __tsan_read##n(void *at) { HAL_SIM_ACCESS(at, n, HAL_SIM_READ); }                              \
  HAL_SIM_HOOK void __tsan_write##n(void *at) { HAL_SIM_ACCESS(at, n, HAL_SIM_WRITE); }                            \
  HAL_SIM_HOOK void __tsan_unaligned_read##n(void *at) { HAL_SIM_ACCESS(at, n, HAL_SIM_READ); }                    \
  HAL_SIM_HOOK void __tsan_unaligned_write##n(void *at) { HAL_SIM_ACCESS(at, n, HAL_SIM_WRITE); }                  \
  HAL_SIM_HOOK void __tsan_volatile_read##n(void *at) { HAL_SIM_ACCESS(at, n, HAL_SIM_READ | HAL_SIM_VOLATILE); }  \
  HAL_SIM_HOOK void __tsan_volatile_write##n(void *at) { HAL_SIM_ACCESS(at, n, HAL_SIM_WRITE | HAL_SIM_VOLATILE); }
HAL_SIM_SIZES(X)
#undef X
HAL_SIM_HOOK void __tsan_read_range(void *at, unsigned long size) { HAL_SIM_ACCESS(at, size, HAL_SIM_READ); }
HAL_SIM_HOOK void __tsan_write_range(void *at, unsigned long size) { HAL_SIM_ACCESS(at, size, HAL_SIM_WRITE); }
HAL_SIM_HOOK void *__tsan_memcpy(void *to, const void *from, unsigned long size) {
  HAL_SIM_ACCESS(from, size, HAL_SIM_READ);
  HAL_SIM_ACCESS(to, size, HAL_SIM_WRITE);
  return __builtin_memcpy(to, from, size);
}
HAL_SIM_HOOK void *__tsan_memset(void *to, int value, unsigned long size) {
  HAL_SIM_ACCESS(to, size, HAL_SIM_WRITE);
  return __builtin_memset(to, value, size);
}
HAL_SIM_HOOK void __tsan_init() {}
HAL_SIM_HOOK void __tsan_func_entry(void *) {}
HAL_SIM_HOOK void __tsan_func_exit() {}
HAL_SIM_HOOK void __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  hal_sim->fence(HAL_SIM_SYSTEM);
}

/* Of an order as the language numbers them. */
HAL_SIM_UNSEEN static inline int hal_sim_order(int order) {
  return (order == __ATOMIC_RELAXED || order == __ATOMIC_RELEASE ? 0 : HAL_SIM_ACQUIRE) |
         (order >= __ATOMIC_RELEASE ? HAL_SIM_RELEASE : 0);
}
#define X(bits, type)                                                                                      \
  HAL_SIM_HOOK type __tsan_atomic##bits##_load(const type *at, int order) {                                 \
    int acquires = hal_sim_order(order) & HAL_SIM_ACQUIRE;                                                  \
    HAL_SIM_ACCESS(at, sizeof(type), HAL_SIM_LOAD | acquires);                                              \
    type found = __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                     \
    if (acquires) hal_sim->acquired(at, sizeof(type), __builtin_return_address(0));                         \
    return found;                                                                                          \
  }                                                                                                        \
  HAL_SIM_HOOK void __tsan_atomic##bits##_store(type *at, type value, int order) {                          \
    HAL_SIM_ACCESS(at, sizeof(type), HAL_SIM_STORE | (hal_sim_order(order) & HAL_SIM_RELEASE));             \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                        \
  HAL_SIM_HOOK type __tsan_atomic##bits##_exchange(type *at, type value, int order) {                       \
    HAL_SIM_ACCESS(at, sizeof(type), HAL_SIM_UPDATE | hal_sim_order(order));                                \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                                        \
  HAL_SIM_HOOK type __tsan_atomic##bits##_fetch_add(type *at, type value, int order) {                      \
    HAL_SIM_ACCESS(at, sizeof(type), HAL_SIM_UPDATE | hal_sim_order(order));                                \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                                        \
  HAL_SIM_HOOK int __tsan_atomic##bits##_compare_exchange_strong(type *at, type *old, type value, int order, int) { \
    HAL_SIM_ACCESS(at, sizeof(type), HAL_SIM_LOAD); /* one that fails is no more */                          \
    if (__atomic_load_n(at, __ATOMIC_SEQ_CST) == *old)                                                      \
      HAL_SIM_ACCESS(at, sizeof(type), HAL_SIM_UPDATE | hal_sim_order(order));                              \
    return __atomic_compare_exchange_n(at, old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
  }
X(32, unsigned) X(64, unsigned long long)
#undef X
#endif

# The expert-parallel module `_ep`, beside `_native`.
set(ep_sources)
foreach(part module engine mail dispatch combine packed window kernels tensors)
  list(APPEND ep_sources ${CMAKE_CURRENT_LIST_DIR}/${part}.cpp)
endforeach()
nanobind_add_module(_ep NB_STATIC ${ep_sources})
target_compile_features(_ep PRIVATE cxx_std_17)
# Contraction off: products and sums are rounded apart, as the specification says.
target_compile_options(_ep PRIVATE -O3 -ffp-contract=off -Wall -Wextra
  $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>) # of its own intrinsics headers
target_link_libraries(_ep PRIVATE Threads::Threads)
install(TARGETS _ep LIBRARY DESTINATION hal_cpu)

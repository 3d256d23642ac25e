/* Between the engine and code that was compiled for it: all that a module and the simulator know of each other. */
#pragma once

/* What a memory access is: plain, or an atomic operation, whose order is added. */
enum { HAL_SIM_READ, HAL_SIM_WRITE, HAL_SIM_LOAD, HAL_SIM_STORE, HAL_SIM_UPDATE };
enum { HAL_SIM_ACQUIRE = 8, HAL_SIM_RELEASE = 16, HAL_SIM_VOLATILE = 32, HAL_SIM_KIND = 7 };
/* How far a fence reaches. */
enum { HAL_SIM_DEVICE, HAL_SIM_SYSTEM };
/* Whose value a shuffle brings. */
enum { HAL_SIM_XOR, HAL_SIM_DOWN, HAL_SIM_UP, HAL_SIM_LANE };

/* Given by the engine to every module it loads. */
struct hal_sim_engine {
  unsigned (*index)(int which); /* 0 thread, 1 group, 2 groups, 3 threads, 4 width of a wavefront */
  void (*barrier)(const char *file, int line, int place);
  unsigned long long (*shuffle)(unsigned long long value, int how, int operand, int width, const char *file,
                                int line, int place);
  void (*access)(const void *address, unsigned long size, int kind, const void *from); /* before it happens */
  void (*acquired)(const void *address, unsigned long size, const void *from);         /* after such a load */
  void (*fence)(int scope);
};

struct hal_sim_parameter {
  unsigned size, alignment, element; /* what a pointer points to has `element` bytes, 0 for what is no pointer */
};

/* Given by a module: `hal_sim_kernels`, ended by one without a name. */
struct hal_sim_kernel {
  const char *name;
  void (*call)(void **given);
  const char *names; /* of the parameters, one a line */
  const hal_sim_parameter *parameters;
  unsigned count;
};

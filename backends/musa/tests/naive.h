/* What MLA decode costs when nothing is shared: a thread a score, a thread a row of scores, a thread an output. */
HAL_KERNEL(64)
void naive_scores(HAL_GLOBAL const hal_u16 *q, HAL_GLOBAL const hal_u16 *kv, HAL_GLOBAL const int *table,
                  HAL_GLOBAL float *scores, int tokens, int d, int page, float scale) {
  int blocks = tokens / 64, t = HAL_GROUP % blocks * 64 + HAL_THREAD, head = HAL_GROUP / blocks;
  float sum = 0.0f;
  for (int c = 0; c < d; c++)
    sum += HAL_AS_FLOAT((hal_u32)q[head * d + c] << 16) *
           HAL_AS_FLOAT((hal_u32)kv[(table[t / page] * page + t % page) * d + c] << 16);
  scores[head * tokens + t] = sum * scale;
}

HAL_KERNEL(1)
void naive_softmax(HAL_GLOBAL float *scores, int tokens) {
  HAL_GLOBAL float *mine = scores + HAL_GROUP * tokens;
  float highest = mine[0], sum = 0.0f;
  for (int t = 1; t < tokens; t++) highest = HAL_FMAX(highest, mine[t]);
  for (int t = 0; t < tokens; t++) sum += mine[t] = HAL_EXP2(mine[t] - highest);
  for (int t = 0; t < tokens; t++) mine[t] /= sum;
}

HAL_KERNEL(64)
void naive_values(HAL_GLOBAL const float *scores, HAL_GLOBAL const hal_u16 *kv, HAL_GLOBAL const int *table,
                  HAL_GLOBAL float *out, int tokens, int d, int d_v, int page) {
  int blocks = d_v / 64, c = HAL_GROUP % blocks * 64 + HAL_THREAD, head = HAL_GROUP / blocks;
  float sum = 0.0f;
  for (int t = 0; t < tokens; t++)
    sum += scores[head * tokens + t] * HAL_AS_FLOAT((hal_u32)kv[(table[t / page] * page + t % page) * d + c] << 16);
  out[head * d_v + c] = sum;
}

// Runs the checks of one client and prints one JSON line for each.
const checks = [];
export const check = (name, body) => checks.push([name, body]);
export const equal = (a, b) => {
  const [x, y] = [JSON.stringify(a), JSON.stringify(b)];
  if (x !== y) throw new Error(`${x} is not ${y}`);
};
export const fails = async (body, test) => {
  try {
    await body();
  } catch (error) {
    if (!test(error)) throw error;
    return;
  }
  throw new Error("it did not fail");
};
export const run = async () => {
  for (const [name, body] of checks) {
    try {
      await body();
      console.log(JSON.stringify({ check: name, ok: true }));
    } catch (error) {
      console.log(JSON.stringify({ check: name, ok: false, error: String(error.stack || error) }));
    }
  }
};
